"""Experts: each gets a Hessian, however few tokens were routed to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine import block as block_module
from gptq_cli.engine.block import Block
from gptq_cli.engine.calls import BlockCall
from gptq_cli.engine.capture import Captured
from gptq_cli.engine.loop import LoopOptions, quantize_blocks
from gptq_cli.engine.stages import Stage, collection_passes
from gptq_cli.errors import NotPositiveDefinite
from gptq_cli.events import Event, Warned
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.placement.device import CPU
from gptq_cli.placement.schedule import BlockSchedule, ReplayReason
from gptq_cli.results.run import LinearReport
from tests.gptq.cases import activations, weights

K, INNER, EXPERTS = 32, 64, 4


class Expert(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, INNER, bias=False), nn.Linear(INNER, K, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(weights(INNER, K, seed).float() * 8)
            self.down.weight.copy_(weights(K, INNER, seed + 1).float() * 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Routed(nn.Module):
    """Expert 3 gets no token, expert 2 one in a hundred, the others share the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(10 * i) for i in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, K)
        number = (flat[:, 0].abs() * 1e4).long()
        choice = torch.where(number % 100 == 0, 2, number % 2)
        out = flat.clone()
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero()[:, 0]
            if len(rows):
                out[rows] += expert(flat[rows])
        return out.view(x.shape)


def block_schedule(replayed: ReplayReason | None, expert_batch_bytes: int = 1 << 30) -> BlockSchedule:
    return BlockSchedule(
        name="layers.0",
        storage_device=CPU,
        execution_device=CPU,
        replayed=replayed,
        expert_batch_bytes=expert_batch_bytes,
    )


def quantized(
    config: QuantizeConfig, events: list[Event], schedule: BlockSchedule | None = None
) -> dict[str, LinearReport]:
    module = Routed()
    infos = tuple(
        LinearInfo(
            name=f"layers.0.{name}",
            source_key=f"layers.0.{name}.weight",
            block="layers.0",
            in_features=linear.in_features,
            out_features=linear.out_features,
            bias=False,
            transposed=False,
        )
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    )
    hidden = list(activations(8 * 200, K).float().view(4, 2, 200, K))
    call = BlockCall((), {})
    captured = Captured(
        hidden=hidden, calls=[[call] * 4], probes=[call], samples=[(2 * i, 2 * i + 1) for i in range(4)]
    )
    handed: list[tuple[LinearInfo, PackedTensors]] = []
    (report,) = quantize_blocks(
        [Block(schedule or block_schedule("experts"), module, infos)],
        captured,
        config,
        LoopOptions(strict=True, devices=(CPU,)),
        lambda info, packed: handed.append((info, packed)),
        events.append,
    )
    assert len(handed) == 2 * EXPERTS
    return {linear.name.removeprefix("layers.0.experts."): linear for linear in report.linears}


@pytest.mark.parametrize("true_sequential", [True, False])
def test_an_expert_without_a_token_is_quantized_by_gptq(true_sequential: bool) -> None:
    events: list[Event] = []
    config = QuantizeConfig(group_size=32, solve_for="own", true_sequential=true_sequential)
    reports = quantized(config, events)
    assert {report.method for report in reports.values()} == {"gptq"}
    assert reports["3.up"].tokens == reports["3.down"].tokens == 0
    assert 0 < reports["2.up"].tokens < K
    assert reports["0.up"].tokens > 500
    assert all(0 < report.loss < 0.8 * report.rtn_loss for report in reports.values())
    told = [event.message for event in events if isinstance(event, Warned)]
    assert any("2 of 4 linears saw fewer tokens" in text and "experts.3.up: 0 of 32" in text for text in told)


def test_without_the_pool_it_would_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        block_module, "shrink_to_pooled", lambda moments: [moment.hessian() for moment in moments]
    )
    with pytest.raises(NotPositiveDefinite, match="no calibration token"):
        quantized(QuantizeConfig(group_size=32, solve_for="own"), [])


@pytest.mark.parametrize("true_sequential", [True, False])
def test_experts_that_the_plan_did_not_know_are_replayed_and_warned_of(true_sequential: bool) -> None:
    """A plan that has the block parked is corrected: same result, and one warning more."""
    config = QuantizeConfig(group_size=32, solve_for="own", true_sequential=true_sequential)
    planned: list[Event] = []
    corrected: list[Event] = []
    ours = quantized(config, corrected, block_schedule(None))
    theirs = quantized(config, planned, block_schedule("experts"))
    assert [r.loss for r in ours.values()] == [r.loss for r in theirs.values()]
    more, usual = ([e.message for e in events if isinstance(e, Warned)] for events in (corrected, planned))
    assert more[1:] == usual
    assert "'experts.0.up' and 7 more linears see a part of the tokens" in more[0]
    assert "replayed" in more[0]


def test_expert_batches_change_nothing_but_the_pool_they_share() -> None:
    """Small batches: each expert is alone with its Hessian, so that one without a token cannot be solved."""
    alone = block_schedule("experts", expert_batch_bytes=1)
    with pytest.raises(NotPositiveDefinite, match="no calibration token"):
        quantized(QuantizeConfig(group_size=32, solve_for="own"), [], alone)


def test_expert_batches_hold_one_width_and_no_more_than_fits() -> None:
    once = Stage(("q",))
    wide, narrow = ([Stage((f"{i}.{kind}",), once=False) for i in range(3)] for kind in ("up", "down"))
    mixed = [stage for pair in zip(wide, narrow, strict=True) for stage in pair]
    columns = {"q": 8, **{s.leader: 64 for s in wide}, **{s.leader: 16 for s in narrow}}

    def passes(schedule: BlockSchedule, *, true_sequential: bool) -> list[list[Stage]]:
        return collection_passes(
            [once, *mixed],
            columns,
            true_sequential=true_sequential,
            experts_per_batch=schedule.experts_per_batch,
        )

    assert passes(block_schedule("experts"), true_sequential=True) == [[once], wide, narrow]
    two = block_schedule("experts", expert_batch_bytes=2 * 4 * 64 * 64)
    assert passes(two, true_sequential=False) == [[once], wide[:2], wide[2:], narrow]
