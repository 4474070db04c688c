"""The schedule of a run: micro-batches, stages, which forwards are parked, where a block is worked on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.device import Device
from gptq_cli.placement.placement import Placement
from gptq_cli.planning.cases import Work

MICRO_BATCH_TOKENS = 2048
"""Tokens of a micro-batch where no batch size was asked for."""


@dataclass(frozen=True, slots=True)
class StageShape:
    """A stage reduced to what costs memory: `rows` = ΣN of its linears over `in_features` = K columns."""

    in_features: int
    rows: int
    routed: bool = False
    """Experts, whose Hessians are collected a wave at a time."""


def stages_of(linears: Iterable[LinearFact]) -> tuple[StageShape, ...]:
    """The stages of one block, in order."""
    stages: dict[int, StageShape] = {}
    for linear in linears:
        before = stages.get(linear.stage)
        rows = (before.rows if before else 0) + linear.out_features
        stages[linear.stage] = StageShape(
            max(linear.in_features, before.in_features if before else 0), rows, linear.routed
        )
    return tuple(stages[number] for number in sorted(stages))


def can_park(stages: Iterable[StageShape], work: Work, *, parked: bool) -> bool:
    """Whether a block of these stages keeps its forwards parked: where there is room (`parked`), stages come
    one after the other, and no linear waits for tokens to choose it."""
    return parked and work.quantize.true_sequential and not any(stage.routed for stage in stages)


def micro_batch_tokens(work: Work) -> int:
    """Tokens of one micro-batch."""
    calibration = work.calibration
    if calibration.batch_size is not None:
        return min(calibration.batch_size, calibration.samples) * calibration.seq_len
    fitting = max(1, MICRO_BATCH_TOKENS // calibration.seq_len)
    return min(fitting, calibration.samples) * calibration.seq_len


def block_linears(facts: ModelFacts) -> dict[str, list[LinearFact]]:
    """Linears by block, in order."""
    by_block: dict[str, list[LinearFact]] = {block: [] for block in facts.blocks}
    for linear in facts.linears:
        by_block.setdefault(linear.block, []).append(linear)
    return by_block


def storage_device(placement: Placement, block: str) -> Device:
    """The device of a block; for a block that a rule split, the device of its first part."""
    for entry in placement.entries:
        if (
            entry.name in ("", block)
            or block.startswith(entry.name + ".")
            or entry.name.startswith(block + ".")
        ):
            return entry.device
    return placement.main_device
