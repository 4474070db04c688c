"""Packed linears in the places of fused experts; what they cannot take the place of is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.errors import CheckpointError
from gptq_cli.inference.experts import drop_packed, expert_linear, put_bias
from gptq_cli.inference.load import default_placement, load_quantized, packed_linears
from gptq_cli.model.expert_linears import ExpertLinear, unfuse
from gptq_cli.model.fused import FusedExperts, FusedTensor
from tests.checkpoint.checkpoints import Recipe, quantize_directory
from tests.conftest import TinyFactory


@pytest.fixture
def checkpoint(tiny: TinyFactory, tmp_path: Path) -> Path:
    quantize_directory(tiny("qwen3_moe"), tmp_path / "q", Recipe(group_size=32))
    return tmp_path / "q"


def test_the_parameters_are_gone(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint, dtype="float32")
    model = load_quantized(opened, default_placement(opened))
    assert "model.layers.1.mlp.experts.2.up_proj" in packed_linears(model)
    assert not [name for name, _ in model.named_parameters() if "experts" in name]
    assert not [name for name, tensor in model.named_buffers() if tensor.is_meta]


def test_an_index_beyond_the_experts_means_none(checkpoint: Path) -> None:
    """Transformers marks tokens of other processes by the number of experts."""
    opened = open_checkpoint(checkpoint, dtype="float32")
    experts = load_quantized(opened, default_placement(opened)).model.layers[1].mlp.experts
    with torch.inference_mode():
        out = experts(torch.randn(3, 64), torch.full((3, 2), 4), torch.ones(3, 2))
    assert torch.equal(out, torch.zeros(3, 64))


def test_experts_that_are_not_known_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return hidden_states * self.gate_up_proj.norm()

    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    opened = open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"qweight goes into .*_proj, which is not supported: .*norm"):
        expert_linear(opened, opened.experts[0])


def biased() -> nn.Module:
    model = nn.Module()
    model.experts = nn.Module()
    with torch.device("meta"):
        model.experts.both = nn.Parameter(torch.empty(3, 8, 12))
        model.experts.both_bias = nn.Parameter(torch.empty(3, 12))
    tensor = FusedTensor(
        leaf="both",
        experts=3,
        in_features=8,
        out_features=12,
        transposed=True,
        roles=("gate_proj", "up_proj"),
        interleaved=True,
        bias="both_bias",
    )
    unfuse(model, [FusedExperts(name="experts", tensors=(tensor,), user="experts")])
    return model


def test_biases_go_to_their_places() -> None:
    model = biased()
    linear = model.get_submodule("experts.2.up_proj")
    assert isinstance(linear, ExpertLinear)
    put_bias(linear, torch.arange(6.0))
    assert torch.equal(model.experts.both_bias[2, 1::2], torch.arange(6.0))
    put_bias(model.get_submodule("experts.0.gate_proj"), torch.ones(6))
    assert float(model.experts.both_bias.sum()) == 15 + 6


def test_every_linear_has_to_be_quantized() -> None:
    model = biased()
    drop_packed("experts", model.experts)
    assert "both" in dict(model.experts.named_parameters()), "all of them are dense"
    model.set_submodule("experts.1.up_proj", nn.Linear(8, 6, bias=False))
    with pytest.raises(
        CheckpointError, match=r"experts: 0.gate_proj is not quantized, though others of both"
    ):
        drop_packed("experts", model.experts)
