"""What a plan decides besides places: micro-batch, parked or replayed, and where a block is worked on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.schedule import Schedule, lighter
from gptq_cli.planning.cases import Work
from gptq_cli.planning.schedule import EXPERT_BATCH_BYTES, KNEE_TOKENS, MICRO_BATCH_TOKENS
from gptq_cli.preflight.resolve import Resolution
from tests.planning.schedules import schedule
from tests.preflight.shapes import SMALL_WORK, llama, resolved

FACTS = llama(blocks=4)
CUDA0, CUDA1 = Device("cuda", 0), Device("cuda", 1)
LONG = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=256, seq_len=512))


def of(made: Resolution) -> Schedule:
    assert made.schedule is not None, made.report
    return made.schedule


@pytest.mark.parametrize(
    ("samples", "seq_len", "batch_size", "tokens"),
    [
        (128, MICRO_BATCH_TOKENS, None, MICRO_BATCH_TOKENS),
        (128, MICRO_BATCH_TOKENS // 4, None, MICRO_BATCH_TOKENS),
        (2, MICRO_BATCH_TOKENS // 4, None, MICRO_BATCH_TOKENS // 2),
        (128, MICRO_BATCH_TOKENS * 2, None, MICRO_BATCH_TOKENS * 2),
        (8, 512, 2, 1024),
    ],
)
def test_micro_batch_on_a_cpu(samples: int, seq_len: int, batch_size: int | None, tokens: int) -> None:
    data = CalibrationConfig(samples=samples, seq_len=seq_len, batch_size=batch_size)
    work = Work(QuantizeConfig(solve_for="own"), data)
    assert of(resolved("cpu", FACTS, "cpu=64GiB", work=work)).micro_batch_tokens == tokens


def test_a_micro_batch_on_an_accelerator_grows_to_the_knee() -> None:
    made = of(resolved("auto", FACTS, "cuda:0=80GiB,cpu=64GiB", work=LONG))
    assert made.micro_batch_tokens == KNEE_TOKENS
    few = replace(LONG, calibration=replace(LONG.calibration, samples=6))
    assert of(resolved("auto", FACTS, "cuda:0=80GiB,cpu=64GiB", work=few)).micro_batch_samples == 6


def test_a_batch_size_that_is_given_wins() -> None:
    given = replace(LONG, calibration=replace(LONG.calibration, batch_size=3))
    assert of(resolved("auto", FACTS, "cuda:0=80GiB,cpu=64GiB", work=given)).micro_batch_samples == 3


@pytest.mark.parametrize("spec", ["auto", "cuda:0"])
def test_it_grows_as_far_as_the_budget_leaves_five_percent_free(spec: str) -> None:
    """Never at the price of the placement, or of forwards that could be parked."""
    sizes = []
    smallest = replace(
        LONG, calibration=replace(LONG.calibration, batch_size=MICRO_BATCH_TOKENS // LONG.calibration.seq_len)
    )
    for mebibytes in range(1024, 4096, 128):
        devices = f"cuda:0={mebibytes}MiB,cpu=64GiB"
        made, small = (resolved(spec, FACTS, devices, work=work) for work in (LONG, smallest))
        if not made.report.ok:
            continue
        assert made.placement == small.placement
        assert of(made).blocks == of(small).blocks
        sizes.append(of(made).micro_batch_tokens)
        if sizes[-1] > MICRO_BATCH_TOKENS:
            assert made.devices[0].needed_bytes <= 0.95 * made.devices[0].limit_bytes
            assert made.devices[0].working_bytes > small.devices[0].working_bytes
    assert sizes[0] == MICRO_BATCH_TOKENS
    assert sizes[-1] == KNEE_TOKENS
    assert len(set(sizes)) > 2


def test_blocks_that_rest_on_the_cpu_are_worked_on_by_the_main_device() -> None:
    made = of(resolved("model.layers.2=1,model.layers.3=cpu,rest=0", FACTS))
    stored = [block.storage_device for block in made.blocks]
    assert stored == [None, None, None, CPU], "the others rest in the files"
    executed = [block.execution_device for block in made.blocks]
    assert executed == [block.activation_device for block in made.blocks] == [CUDA0, CUDA0, CUDA1, CUDA0]
    alone = of(resolved("cpu", FACTS, "cpu=64GiB"))
    assert {block.execution_device for block in alone.blocks} == {CPU}


def test_forwards_are_replayed_for_a_reason_that_is_named() -> None:
    routed = tuple(
        replace(linear, routed=linear.block == "model.layers.1" and linear.stage > 1)
        for linear in FACTS.linears
    )
    experts = replace(FACTS, linears=routed)
    found = schedule(experts, SMALL_WORK, parked=True)
    assert [block.replayed for block in found.blocks] == [None, "experts", None, None]
    assert [block.parked for block in found.blocks] == [True, False, True, True]
    found = schedule(experts, SMALL_WORK, parked=False)
    assert [block.replayed for block in found.blocks] == ["memory", "experts", "memory", "memory"]
    together = Work(replace(SMALL_WORK.quantize, true_sequential=False), SMALL_WORK.calibration)
    found = schedule(experts, together, parked=True)
    assert {block.replayed for block in found.blocks} == {"not-sequential"}


def test_as_many_experts_as_their_hessians_allow_and_at_least_one() -> None:
    block = schedule(FACTS, SMALL_WORK, parked=True).block("model.layers.1")
    assert block.experts_per_batch(2048) == EXPERT_BATCH_BYTES // (4 * 2048**2)
    assert block.experts_per_batch(1 << 16) == 1


def test_without_work_or_without_a_placement_there_is_no_schedule() -> None:
    assert resolved("cpu", FACTS, "cpu=64GiB", work=None).schedule is None
    assert resolved("auto", FACTS, "cuda:0=1MiB,cpu=1MiB").schedule is None


def test_less_memory_step_by_step() -> None:
    """Each step needs less than the one before, and the last one changes nothing more."""
    made: Schedule | None = of(resolved("auto", FACTS, "cuda:0=80GiB,cpu=64GiB", work=LONG))
    steps: list[tuple[int, bool, set[Device]]] = []
    while made is not None:
        parked = any(block.parked for block in made.blocks)
        steps.append((made.micro_batch_samples, parked, {b.activation_device for b in made.blocks}))
        less = lighter(made)
        made = less[0] if less is not None else None
    assert steps == [
        (32, True, {CUDA0}),
        (8, True, {CUDA0}),
        (2, True, {CUDA0}),
        (1, True, {CUDA0}),
        (1, False, {CUDA0}),
        (1, False, {CPU}),
    ]
