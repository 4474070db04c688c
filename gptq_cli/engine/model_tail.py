"""From what the last block hands on to the loss, and back: the model's own norm, head, and what it does else.

Logits are made for some tokens at a time, because a vocabulary is wide. Those of the dense model are made
beside them, from its hidden states, with the same head and the norms as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gptq_cli.devices.accelerators import working_on
from gptq_cli.devices.fp32_matmul import matmul_scope
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.engine.stand_ins import behind_blocks
from gptq_cli.engine.tuned_block import step_vectors
from gptq_cli.gptq.feedback import drawn_label_gradient
from gptq_cli.gptq.tuning import Moving, divergence
from gptq_cli.model.flow import Flow
from gptq_cli.placement.schedule import TUNE_LOGITS

Sample = tuple[Tensor, Tensor]
"""Ids (1, seq_len); what the dense model's last block handed on for them (1, seq_len, hidden_size)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTail:
    """All of the model but its blocks."""

    model: Any
    """The language model, head included."""
    blocks: Sequence[nn.Module]
    flow: Flow
    device: torch.device
    """Where embedding and head are."""
    vectors: Mapping[str, Moving]
    """Gains and biases outside the blocks, by their names in the model."""

    def loss(self, samples: Sequence[Sample], out: Tensor, part: float) -> float:
        """KL summed over all tokens of some samples; `out`: what the last block of the quantized model handed
        on for them (samples, seq_len, hidden_size)."""
        values = {name: vector.value(part) for name, vector in self.vectors.items()}
        with torch.no_grad():
            return sum(
                float(self._divergence(ids, goal, hidden, values))
                for sample, row in zip(samples, out, strict=True)
                for ids, goal, hidden in self._pieces(sample, row[None])
            )

    def step(
        self,
        batches: Sequence[tuple[Sequence[Sample], Tensor]],  # as `loss` is given them
        tokens: int,
        rate: float,
    ) -> list[Tensor]:
        """Move the vectors by the gradient of the mean over `tokens`; the gradient of the sum with respect to
        what the last block handed on, for each micro-batch: that of the mean is too small for float16."""
        values = {name: vector.value().clone().requires_grad_() for name, vector in self.vectors.items()}
        gradients = []
        for samples, out in batches:
            found = torch.empty_like(out)
            for sample, row, into in zip(samples, out, found, strict=True):
                at = 0
                for ids, goal, hidden in self._pieces(sample, row[None]):
                    with torch.enable_grad():
                        entering = hidden.detach().requires_grad_()
                        loss = self._divergence(ids, goal, entering, values)
                        loss.backward()  # type: ignore[no-untyped-call]
                    assert entering.grad is not None
                    into[at : at + ids.shape[1]] = entering.grad[0]
                    at += ids.shape[1]
            gradients.append(found)
        step_vectors(self.vectors, values, tokens, rate)
        return gradients

    def label_gradient(
        self,
        ids: Tensor,  # (1, seq_len) int64
        out: Tensor,  # (seq_len, hidden_size): what the last block handed on
        generator: torch.Generator,
    ) -> Tensor:  # (seq_len, hidden_size)
        """The gradient of the model's loss on labels that it draws itself, see `gptq.feedback`."""
        found, at = torch.empty_like(out), 0
        for own_ids, _, hidden in self._pieces((ids, out[None]), out[None]):
            with torch.enable_grad():
                entering = hidden.detach().requires_grad_()
                logits = self._logits(own_ids, entering, {})[0]
                logits.backward(drawn_label_gradient(logits, generator))  # type: ignore[no-untyped-call]
            assert entering.grad is not None
            found[at : at + own_ids.shape[1]] = entering.grad[0]
            at += own_ids.shape[1]
        return found

    def _pieces(self, sample: Sample, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Ids, goal and hidden states of some tokens at a time, on this device."""
        ids, goal = sample
        size = max(1, TUNE_LOGITS // self.model.get_output_embeddings().weight.shape[0])
        for start in range(0, ids.shape[1], size):
            part = slice(start, start + size)
            yield tuple(to_device(x[:, part], self.device) for x in (ids, goal, out))  # type: ignore[misc]

    def _divergence(self, ids: Tensor, goal: Tensor, hidden: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = self._logits(ids, goal, {})
        return divergence(self._logits(ids, hidden, values)[0], wanted[0])

    def _logits(self, ids: Tensor, hidden: Tensor, values: Mapping[str, Tensor]) -> Tensor:  # (1, tokens, V)
        """Token by token alike, so that any tokens can be taken out of a sample."""
        with (
            behind_blocks(self.blocks, self.flow, hidden),
            working_on(self.device),
            matmul_scope(hidden.dtype, self.device),
        ):
            words = {"input_ids": ids, "use_cache": False}
            logits = functional_call(self.model, dict(values), (), words).logits
        assert isinstance(logits, Tensor)
        return logits
