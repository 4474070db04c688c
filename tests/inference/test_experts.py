"""Packed experts answer like the fused module; kinds that they cannot stand for are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_cli.errors import CheckpointError
from gptq_cli.inference.experts import PackedExperts, by_role, check_servable
from tests.tiny import tiny_model


def fused_experts() -> nn.Module:
    model = tiny_model("qwen3_moe")
    return model.model.layers[1].mlp.experts


def as_linears(fused: nn.Module) -> dict[str, list[nn.Module]]:
    """Dense linears of the fused tensors: gate and up halves, down."""
    result: dict[str, list[nn.Module]] = {"gate": [], "up": [], "down": []}
    for both, down in zip(fused.gate_up_proj.detach().clone(), fused.down_proj.detach().clone(), strict=True):
        halves = both.chunk(2)
        for role, weight in (("gate", halves[0]), ("up", halves[1]), ("down", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight
            result[role].append(linear)
    return result


def test_the_same_answer_as_the_fused_module() -> None:
    fused = fused_experts()
    roles = as_linears(fused)
    hidden = torch.randn(10, 64)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    weights = torch.rand(10, 2)
    with torch.no_grad():
        expected = fused(hidden, chosen, weights)
        packed = PackedExperts(fused, roles["gate"], roles["up"], roles["down"])
        found = packed(hidden, chosen, weights)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not list(fused.parameters())


def test_an_index_beyond_the_experts_means_none() -> None:
    """Transformers marks tokens of other processes by the number of experts."""
    roles = as_linears(fused := fused_experts())
    packed = PackedExperts(fused, roles["gate"], roles["up"], roles["down"])
    out = packed(torch.randn(3, 64), torch.full((3, 2), 4), torch.ones(3, 2))
    assert torch.equal(out, torch.zeros(3, 64))


@pytest.mark.parametrize("field", ["has_bias", "is_transposed", "has_post_expert_norm"])
def test_other_kinds_of_experts_are_refused(field: str) -> None:
    fused = fused_experts()
    check_servable("experts", fused)
    setattr(fused, field, True)
    with pytest.raises(CheckpointError, match=f"experts .*{field} = True"):
        check_servable("experts", fused)


def test_every_expert_needs_every_role() -> None:
    module = nn.Identity()
    found: dict[tuple[str, int], nn.Module] = {
        (role, expert): module for role in ("gate", "up", "down") for expert in range(3)
    }
    assert len(by_role("experts", found)["up"]) == 3
    del found["up", 1]
    with pytest.raises(CheckpointError, match="expert 1 has no quantized up projection"):
        by_role("experts", found)
