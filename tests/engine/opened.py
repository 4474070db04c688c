"""A tiny model opened the way the engine sees one: its decoder, its blocks, their linears."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gptq_cli.engine.capture import Captured, capture
from gptq_cli.model.flow import Flow
from gptq_cli.model.trace import trace
from tests.tiny import VOCAB, tiny_model


@dataclass
class Opened:
    model: Any
    blocks: list[nn.Module]
    input_ids: Tensor

    @property
    def flow(self) -> Flow:
        """How a copy of the model on the meta device hands hidden states on."""
        names = {module: name for name, module in self.model.named_modules()}
        return trace(copy.deepcopy(self.model).to("meta"), {}, [names[block] for block in self.blocks]).flow

    def linears(self, index: int) -> dict[str, nn.Module]:
        named = self.blocks[index].named_modules()
        return {name: module for name, module in named if isinstance(module, nn.Linear | Conv1D)}

    def capture(self, batch_size: int = 2, paired_samples: int = 0) -> Captured:
        return capture(
            self.model.base_model,
            self.blocks,
            self.input_ids,
            self.flow,
            batch_size=batch_size,
            input_device=torch.device("cpu"),
            paired_samples=paired_samples,
        )


def open_tiny(name: str, samples: int = 5, seq_len: int = 24) -> Opened:
    """Five samples of 24 tokens: the last micro-batch of two is a single sample."""
    model = tiny_model(name).eval()
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = list(max(lists, key=lambda module: sum(p.numel() for p in module.parameters())))
    ids = torch.randint(0, VOCAB, (samples, seq_len), generator=torch.Generator().manual_seed(1))
    return Opened(model, blocks, ids)
