"""The residual of a linear is found by what is added up, and handed out for the right micro-batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.engine.calls import BlockCall, hidden_of
from gptq_cli.engine.forwards import Forwards, ParkedForwards, ReplayedForwards
from gptq_cli.engine.residuals import BLOCK_INPUT, Residual, Source, find_residuals
from gptq_cli.engine.stages import Stage, find_stages
from tests.engine.opened import Opened, open_tiny
from tests.tiny import TINY

PRE_NORM = {"self_attn.o_proj": (BLOCK_INPUT,), "mlp.down_proj": (Source("post_attention_layernorm"),)}
EXPECTED: dict[str, dict[str, tuple[Source, ...]]] = {
    "llama": PRE_NORM,
    "qwen3": PRE_NORM,
    "phi3": PRE_NORM,
    "gpt2": {"attn.c_proj": (BLOCK_INPUT,), "mlp.c_proj": (Source("ln_2"),)},
    "opt": {"self_attn.out_proj": (BLOCK_INPUT,), "fc2": (Source("final_layer_norm"),)},
    # attention and MLP side by side: the one that runs last makes up for the other one, too
    "gpt_neox": {
        "attention.dense": (BLOCK_INPUT,),
        "mlp.dense_4h_to_h": (Source("attention.dense", output=True), BLOCK_INPUT),
    },
    # outputs are normed before they are added
    "gemma2": {
        "self_attn.o_proj": (BLOCK_INPUT,),
        "mlp.down_proj": (Source("pre_feedforward_layernorm"),),
    },
    "olmo2": {"self_attn.o_proj": (BLOCK_INPUT,), "mlp.down_proj": (Source("mlp"),)},
}
NORMED = ("gemma2", "olmo2")


def found(opened: Opened, index: int = 0) -> tuple[tuple[Stage, ...], dict[str, Residual]]:
    captured = opened.capture()
    block, linears, probe = opened.blocks[index], opened.linears(index), captured.probes[index]
    sample = captured.hidden[0][:1, :16]
    stages = find_stages(block, linears, probe, sample)
    return stages, find_residuals(block, linears, stages, probe, sample)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residuals_follow_the_data(name: str, dtype: torch.dtype) -> None:
    opened = open_tiny(name)
    opened.model.to(dtype)
    residuals = found(opened)[1]
    assert {linear: residual.sources for linear, residual in residuals.items()} == EXPECTED[name]
    assert {residual.gain is not None for residual in residuals.values()} == {name in NORMED}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in opened.blocks[0].modules())


@pytest.mark.parametrize("name", TINY)
def test_every_way_hands_out_what_adds_up(name: str) -> None:
    """Residual plus what becomes of the linear's output is what its block passes on, in every micro-batch."""
    opened = open_tiny(name)
    captured = opened.capture()
    block, linears = opened.blocks[0], opened.linears(0)
    stages, residuals = found(opened)
    handed: dict[str, list[tuple[Stage, Tensor, Tensor]]] = {"parked": [], "replayed": []}
    outputs: list[Tensor] = []
    calls, hidden = captured.calls[0], captured.hidden
    ways: dict[str, Forwards] = {
        "parked": ParkedForwards(block, linears, stages, calls, list(hidden), residuals),
        "replayed": ReplayedForwards(block, linears, stages, calls, list(hidden), residuals),
    }
    for way, forwards in ways.items():
        with forwards as run:
            for stage in stages:
                for _, x in run.inputs([stage]):
                    residual = run.residual(stage)
                    assert (residual is None) is (stage.leader not in residuals)
                    if residual is not None:
                        handed[way].append((stage, residual.clone(), x.clone()))
            outputs = [hidden_of(output) for output in run.finish()]
    assert len(handed["parked"]) == len(residuals) * len(calls)
    for (_, ours, _), (_, theirs, _) in zip(handed["parked"], handed["replayed"], strict=True):
        assert torch.equal(ours, theirs)
    last_one = residuals.get(stages[-1].leader)
    ends = stages[-1].leader if last_one and last_one.sources != (BLOCK_INPUT,) else None
    last = [(residual, x) for stage, residual, x in handed["parked"] if stage.leader == ends]
    for (residual, x), output in zip(last, outputs, strict=bool(last)):
        assert ends is not None
        y, gain = linears[ends](x).detach(), residuals[ends].gain
        z = y if gain is None else gain.of_tokens(y) * gain.gamma * y
        total = residual.flatten() + z.flatten()
        close = {} if gain is None else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(total, output.flatten(), **close)


class OddBlock(nn.Module):
    """An MLP whose output is `mixed` into the hidden states as no architecture in the tests does it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.down, self.way = nn.Linear(8, 16), nn.Linear(16, 8), way
        self.norm = nn.LayerNorm(8)

    def forward(self, hidden: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(self.norm(hidden))))
        match self.way:
            case "scaled":
                return hidden + 0.22 * y
            case "alpha":
                return torch.add(hidden, y, alpha=0.5)
            case "in place":
                total = hidden.clone()
                total += y
                return 2 * total
            case "wider":
                return (hidden.double() + y.double()).float()
            case "layer norm":
                return hidden + nn.functional.layer_norm(y, (8,))
            case _:
                return y


@pytest.mark.parametrize(
    ("way", "gamma"),
    [
        ("scaled", 0.22),
        ("alpha", 0.5),
        ("in place", 1.0),
        ("wider", 1.0),
        ("layer norm", None),
        ("none", None),
    ],
)
def test_other_ways_to_add(way: str, gamma: float | None) -> None:
    torch.manual_seed(0)
    block = OddBlock(way)
    linears: dict[str, nn.Module] = {"up": block.up, "down": block.down}
    call, hidden = BlockCall((), {}), torch.randn(1, 12, 8)
    stages = find_stages(block, linears, call, hidden)
    residual = find_residuals(block, linears, stages, call, hidden).get("down")
    if gamma is None:
        assert residual is None
        return
    assert residual is not None
    assert residual.sources == (BLOCK_INPUT,)
    arrives = SimpleNamespace(gamma=torch.ones(8), c=0.0) if residual.gain is None else residual.gain
    torch.testing.assert_close(arrives.gamma, torch.full((8,), gamma))
    assert arrives.c == 0.0
