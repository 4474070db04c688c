from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_cli.engine.calls import BlockCall
from gptq_cli.engine.stages import Stage, find_stages
from tests.engine.opened import open_tiny

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ROTARY_MLP = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
EXPECTED = {
    "llama": ROTARY_MLP,
    "gemma3_text": ROTARY_MLP,
    "phi3": (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    # attention and MLP side by side: one normed input for both
    "falcon": (
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
        ("self_attention.dense",),
        ("mlp.dense_4h_to_h",),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_stages_follow_the_data(name: str) -> None:
    opened = open_tiny(name)
    captured = opened.capture()
    stages = find_stages(opened.blocks[0], opened.linears(0), captured.probes[0], captured.hidden[0][:1, :16])
    assert tuple(stage.linears for stage in stages) == EXPECTED[name]
    assert all(stage.once for stage in stages)


class Odd(nn.Module):
    """One linear runs twice, one never, two read equal values in different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.a, self.b = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(x)) + self.a(x) + self.b(x.clone())


def test_linears_without_one_input_stand_alone() -> None:
    block = Odd()
    linears = dict(block.named_children())
    stages = find_stages(block, linears, BlockCall((), {}), torch.ones(1, 3, 4))
    assert stages == (
        Stage(("a",)),
        Stage(("b",)),
        Stage(("twice",), once=False),
        Stage(("never",), once=False),
    )
    assert not any(module._forward_pre_hooks for module in block.modules())


class Choosing(nn.Module):
    """The first expert takes every token of the sample, the second all but one, and both run once."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.shared = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 4)
        first, second = self.experts
        return self.shared(x) + first(rows).view(x.shape) + second(rows[1:]).sum()


def test_experts_are_told_by_the_tokens_they_lack_and_by_their_like() -> None:
    block = Choosing()
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert find_stages(block, linears, BlockCall((), {}), torch.ones(1, 3, 4)) == (
        Stage(("shared",)),
        Stage(("experts.0.0",), once=False),
        Stage(("experts.1.0",), once=False),
    )


class Rewriting(nn.Module):
    """Both linears read one tensor, which is written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x := x.clone())
        return y + self.after(x.mul_(2))


def test_a_tensor_that_was_written_to_in_between_is_another_input() -> None:
    block = Rewriting()
    stages = find_stages(block, dict(block.named_children()), BlockCall((), {}), torch.ones(1, 3, 4))
    assert stages == (Stage(("before",)), Stage(("after",)))


class Gated(nn.Module):
    """Experts with two linears that share their input, routed by a number in the hidden states."""

    def __init__(self, *, apart: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(4, 4) for name in ("up", "gate")}) for _ in range(3)
        )
        self.apart = apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 4)
        out = torch.zeros_like(flat)
        for number in range(3):
            rows = (flat[:, 0] == number).nonzero()[:, 0]
            if len(rows):
                expert, mine = self.experts[number], flat[rows]
                other = mine.clone() if self.apart and number == 1 else mine
                out[rows] = expert["gate"](mine) * expert["up"](other)
        return out.view(x.shape)


def found(block: nn.Module, numbers: list[float]) -> list[tuple[str, ...]]:
    x = torch.tensor(numbers)[None, :, None].expand(1, -1, 4)
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    stages = find_stages(block, linears, BlockCall((), {}), x)
    assert not any(stage.once for stage in stages)
    return [stage.linears for stage in stages]


def test_linears_of_one_expert_share_a_stage_also_in_experts_that_the_sample_did_not_reach() -> None:
    """In the order of use, also where registration has another."""
    stages = found(Gated(), [2.0, 0.0, 0.0])
    assert stages == [(f"experts.{i}.gate", f"experts.{i}.up") for i in (0, 2, 1)]


def test_where_one_expert_differs_each_linear_is_a_stage() -> None:
    stages = found(Gated(apart=True), [2.0, 0.0, 1.0])
    assert sorted(stages) == sorted((f"experts.{i}.{name}",) for i in range(3) for name in ("gate", "up"))


def test_where_no_expert_was_reached_nothing_is_known() -> None:
    stages = found(Gated(), [7.0, 8.0])
    assert sorted(stages) == sorted((f"experts.{i}.{name}",) for i in range(3) for name in ("gate", "up"))
