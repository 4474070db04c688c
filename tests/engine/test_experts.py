"""Experts: each gets a Hessian, however few tokens were routed to it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine import experts as experts_module
from gptq_cli.engine.calls import BlockCall
from gptq_cli.engine.capture import Captured
from gptq_cli.engine.experts import FewTokens
from gptq_cli.engine.frames import Sharing
from gptq_cli.engine.loop import LoopOptions, _unplanned_warning, quantize_blocks
from gptq_cli.engine.stages import Stage, collection_passes
from gptq_cli.engine.work import Block
from gptq_cli.errors import GptqError, NonFinite, NotPositiveDefinite
from gptq_cli.events import BlockStarted, Event, SamplesAdvanced, Warned
from gptq_cli.gptq import pool as pool_module
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.gptq.pool import Pool
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.placement.device import CPU
from gptq_cli.placement.schedule import BlockSchedule, ReplayReason
from gptq_cli.ranks.leaves import Share
from gptq_cli.results.run import ExpertsReport, LinearReport
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


class Gated(Expert):
    """Like the experts of today's models: gate and up read the same tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.gate = nn.Linear(K, INNER, bias=False)
        with torch.no_grad():
            self.gate.weight.copy_(weights(INNER, K, seed + 2).float() * 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


class Routed(nn.Module):
    """Expert 3 gets no token, expert 2 one in a hundred, the others share the rest."""

    def __init__(self, kind: type[nn.Module] = Expert) -> None:
        super().__init__()
        self.experts = nn.ModuleList(kind(10 * i) for i in range(EXPERTS))

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
        solve_batch_rows=4096,
    )


def quantized(
    config: QuantizeConfig,
    events: list[Event],
    schedule: BlockSchedule | None = None,
    kind: type[nn.Module] = Expert,
) -> dict[str, LinearReport]:
    module = Routed(kind)
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
        hidden=hidden,
        calls=[[call] * 4],
        probes=[call],
        share=Share([(2 * i, 2 * i + 1) for i in range(4)], 0),
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
    assert len(handed) == len(infos)
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
    first, end = told
    assert first.startswith("layers.0: 2 of 4 experts saw fewer calibration tokens than they have columns")
    assert "(the least 0)" in first
    assert end.startswith("experts with few tokens: 2 of 4 experts")
    assert all("no token reached 1 of them: layers.0.experts.3" in text for text in told)
    assert all(report.routed for report in reports.values())
    assert reports["3.up"].pooled == 1.0
    assert reports["2.up"].pooled > 0.5 > reports["0.up"].pooled > 0


def test_without_the_pool_it_would_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "shrink", lambda own, tokens, pool: own)
    monkeypatch.setattr(Pool, "hessian", lambda self: torch.zeros(K, K))
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
    assert "'experts.0.up' and 7 more see a part of the tokens" in more[0]
    assert "replayed" in more[0]


def test_the_warning_of_one_linear_is_in_the_singular() -> None:
    context = SimpleNamespace(unplanned=("fc",), block=SimpleNamespace(name="layers.0"))
    message = _unplanned_warning(context).message  # type: ignore[arg-type]
    assert message.startswith("layers.0: 'fc' sees a part of the tokens, or runs more than once per forward")


@pytest.mark.parametrize("kind", [Expert, Gated])
def test_expert_batches_change_nothing_but_how_much_of_the_pool_is_there(kind: type[nn.Module]) -> None:
    """One expert at a time: an expert without a token gets the whole pool, as in one batch."""
    config = QuantizeConfig(group_size=32, solve_for="own")
    together = quantized(config, [], kind=kind)
    alone = quantized(config, [], block_schedule("experts", expert_batch_bytes=1), kind)
    assert {name: report.method for name, report in alone.items()} == dict.fromkeys(together, "gptq")
    for name in ("3.up", "3.down"):
        assert alone[name].pooled == together[name].pooled == 1.0
    # down reads what the quantized up puts out, and the first experts know less of the others
    assert alone["3.up"].loss == pytest.approx(together["3.up"].loss, rel=1e-4)
    assert all(report.loss < 0.8 * report.rtn_loss for report in alone.values())


def test_gate_and_up_of_every_expert_are_one_stage_also_where_no_token_came() -> None:
    events: list[Event] = []
    quantized(QuantizeConfig(group_size=32, solve_for="own"), events, kind=Gated)
    (started,) = (event for event in events if isinstance(event, BlockStarted))
    pairs = {stage for stage in started.stages if len(stage) == 2}
    assert pairs == {(f"experts.{i}.gate", f"experts.{i}.up") for i in range(EXPERTS)}
    assert len(started.stages) == 2 * EXPERTS


def test_experts_of_one_shape_are_solved_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    real = experts_module.quantize_stages

    def counted(stages: Any, hessians: Tensor, config: QuantizeConfig) -> Any:
        sizes.append((len(stages), hessians.shape[-1]))
        return real(stages, hessians, config)

    monkeypatch.setattr(experts_module, "quantize_stages", counted)
    config = QuantizeConfig(group_size=32, solve_for="own")
    reports = quantized(config, [], kind=Gated)
    assert sizes == [(3, K), (3, INNER)], "expert 3 waits for the pool"
    sizes.clear()
    fewer = replace(block_schedule("experts"), solve_batch_rows=2 * 2 * INNER)
    again = quantized(config, [], fewer, Gated)
    assert sizes == [(2, K), (1, K), (3, INNER)]
    assert [r.loss for r in again.values()] == pytest.approx([r.loss for r in reports.values()], rel=1e-5)


def test_progress_is_told_to_the_last_sample_also_where_an_expert_saw_no_token() -> None:
    """Expert 3, the last of each pass, sees none."""
    events: list[Event] = []
    quantized(QuantizeConfig(group_size=32, solve_for="own"), events)
    told = [(event.stage, event.done) for event in events if isinstance(event, SamplesAdvanced)]
    assert told == [(stage, done) for stage in range(2) for done in (2, 4, 6, 8)]


def test_an_expert_whose_linears_stop_sharing_their_input_is_noticed() -> None:
    stage, sharing = Stage(("gate", "up"), once=False), Sharing()
    x, other = torch.ones(2, K), torch.ones(2, K)
    for _ in range(2):  # each time that tokens are routed to it
        sharing.lead(stage, x)
        sharing.follow("gate", "up", x)
    sharing.end()
    sharing.lead(stage, x)
    with pytest.raises(GptqError, match="'up' and 'gate' shared their input for the traced sample"):
        sharing.follow("gate", "up", other)
    with pytest.raises(GptqError, match="'up' and 'gate' shared their input for the traced sample"):
        sharing.lead(stage, other)


def test_what_cannot_be_solved_is_named() -> None:
    class Loud(Expert):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            if seed == 10:
                with torch.no_grad():
                    self.up.weight[0, 0] = 1e9

    with pytest.raises(NonFinite, match=r"^layers\.0\.experts\.1\.up: the weight reaches 1e\+09") as caught:
        quantized(QuantizeConfig(group_size=32, solve_for="own"), [], kind=Loud)
    assert caught.value.hint == "leave it dense: --module layers.0.experts.1.up=dense"


def report_of(name: str, tokens: int, *, routed: bool = True) -> LinearReport:
    return LinearReport(
        name=name, in_features=K, out_features=8, bits=4, group_size=32, loss=0.1, rtn_loss=0.2,
        damp_percent=0.05, attempts=1, method="gptq", tokens=tokens, routed=routed,
        pooled=K / (K + tokens), seconds=0.1,
    )  # fmt: skip


def test_a_run_speaks_of_few_tokens_once_and_at_its_end() -> None:
    events: list[Event] = []
    watch = FewTokens(events.append)
    watch.block("layers.0", [report_of("layers.0.experts.0.up", 500)])
    assert not events
    for block in (1, 2):
        reports = [report_of(f"layers.{block}.experts.{i}.up", 40 * i) for i in range(3)]
        watch.block(f"layers.{block}", [*reports, report_of(f"layers.{block}.twice", 0, routed=False)])
    watch.end()
    first, end = (event for event in events if isinstance(event, Warned))
    assert first.message.startswith("layers.1: 1 of 3 experts")
    assert end.message.startswith("experts with few tokens: 2 of 7 experts")
    assert "no token reached 2 of them: layers.1.experts.0, layers.2.experts.0" in end.message


def test_what_a_report_says_of_experts() -> None:
    linears = [
        report_of(f"experts.{i}.{kind}", tokens) for i, tokens in enumerate((0, 5, 90)) for kind in ("a", "b")
    ]
    found = ExpertsReport.of([*linears, report_of("once", 3, routed=False)])
    assert found == ExpertsReport(
        experts=3, least_tokens=0, median_tokens=5, most_tokens=90, few=2, unreached=("experts.0",)
    )
    assert ExpertsReport.of([report_of("once", 3, routed=False)]) is None


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
