"""The residual of a linear is found by what adds up, and handed out for the right micro-batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.engine.calls import hidden_of
from gptq_cli.engine.forwards import Forwards, ParkedForwards, ReplayedForwards
from gptq_cli.engine.residuals import BLOCK_INPUT, find_residuals
from gptq_cli.engine.stages import Stage, find_stages
from tests.engine.opened import Opened, open_tiny
from tests.tiny import TINY

PRE_NORM = {"self_attn.o_proj": BLOCK_INPUT, "mlp.down_proj": "post_attention_layernorm"}
EXPECTED = {
    "llama": PRE_NORM,
    "qwen3": PRE_NORM,
    "phi3": PRE_NORM,
    "gpt2": {"attn.c_proj": BLOCK_INPUT, "mlp.c_proj": "ln_2"},
    "opt": {"self_attn.out_proj": BLOCK_INPUT, "fc2": "final_layer_norm"},
    "gemma2": {},  # outputs are normed before they are added
    "olmo2": {},
}


def found(opened: Opened, index: int = 0) -> tuple[tuple[Stage, ...], dict[str, str]]:
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
    assert residuals == EXPECTED[name]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in opened.blocks[0].modules())


@pytest.mark.parametrize("name", TINY)
def test_every_way_hands_out_what_adds_up(name: str) -> None:
    """Residual plus the linear's output is what its block passes on, for every micro-batch."""
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
    for (_, ours, _), (_, theirs, _) in zip(handed["parked"], handed["replayed"], strict=True):
        assert torch.equal(ours, theirs)
    ends = stages[-1].leader if residuals.get(stages[-1].leader, BLOCK_INPUT) != BLOCK_INPUT else None
    last = [(residual, x) for stage, residual, x in handed["parked"] if stage.leader == ends]
    for (residual, x), output in zip(last, outputs, strict=bool(last)):
        total = residual.flatten() + linears[stages[-1].leader](x).detach().flatten()
        torch.testing.assert_close(total, output.flatten())
