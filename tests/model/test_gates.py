"""Linears whose output only gates, found by where their output goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from gptq_cli.config import ModelRef
from gptq_cli.model.blocks import find_blocks
from gptq_cli.model.candidates import candidates_of
from gptq_cli.model.gates import GateFlow, small_gates
from gptq_cli.model.meta import build_meta
from gptq_cli.model.trace import trace

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def gating(class_name: str, **fields: Any) -> set[str]:
    """Last components of the gates of a model on the meta device, with default sizes where none are given."""
    config = getattr(transformers, class_name)(**SHAPE | fields)
    model = build_meta(config, ModelRef(model="made here"), torch.bfloat16, tensors=100_000)
    found = trace(model, candidates_of(model, find_blocks(model)[1]))
    assert found.complete
    return {name.rpartition(".")[2] for name in found.gating}


def test_the_gates_of_a_delta_network() -> None:
    assert gating("Qwen3_5TextConfig", **DELTA) == {"in_proj_a", "in_proj_b"}


@pytest.mark.parametrize("class_name", ["LlamaConfig", "GemmaConfig", "MistralConfig"])
def test_keys_of_one_head_and_the_gate_of_an_mlp_are_none(class_name: str) -> None:
    assert gating(class_name) == set()


class Mixed(nn.Module):
    """One input, read by linears whose outputs have every fate."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("sigmoid", "added", "product", "value", "unused"):
            setattr(self, name, nn.Linear(8, 4))

    def forward(self, x: Tensor, flow: GateFlow) -> Tensor:
        out = {name: module(x) for name, module in self.named_children()}
        for name, value in out.items():
            flow.follow(name, value)
        gate = torch.sigmoid(out["sigmoid"]) * functional.softplus(out["added"].float() + 1).view(-1, 4)
        product = out["product"] @ torch.ones(4, 4)
        return gate * torch.sigmoid(product) + torch.ones(2, 2) @ out["value"]


def test_what_comes_first_decides() -> None:
    module = Mixed()
    flow = GateFlow(name for name, _ in module.named_children())
    with torch.no_grad(), flow:
        module(torch.randn(2, 8), flow)
    assert flow.gating == {"sigmoid", "added"}


def test_a_gate_is_small_beside_its_widest_sibling() -> None:
    rows = {"wide": 1024, "tiny": 64, "half": 129, "alone": 4, "near": 65}
    stages = [("wide", "tiny", "half"), ("alone",), ("near", "tiny2")]
    assert small_gates(["wide", "tiny", "half", "alone"], stages, rows) == {"tiny"}
    assert small_gates(["near"], [("near", "other")], {"near": 65, "other": 519}) == frozenset()
    assert small_gates(["near"], [("near", "other")], {"near": 65, "other": 520}) == {"near"}
