"""A quantized head in the plan: where it is worked on, its memory, its time."""

from __future__ import annotations

from dataclasses import replace

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.device import Device
from gptq_cli.placement.schedule import HEAD_ROWS, SOLVE_BYTES
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import PACK_BYTES, head_work_set, packed_bytes
from gptq_cli.planning.rates import MachineRates
from gptq_cli.planning.time import job_seconds
from tests.preflight.shapes import llama, resolved

WORK = Work(
    QuantizeConfig(solve_for="own", group_size=128, quantize_head=True),
    CalibrationConfig(samples=32, seq_len=512),
)
SPEED = MachineRates(1e12, 1e11, 1e11, 1e-4, 1e-8)


def headed(rows: int, *, tied: bool = False) -> ModelFacts:
    head = LinearFact(name="lm_head", block="", in_features=1024, out_features=rows)
    return replace(llama(blocks=2, vocab=rows, tied=tied), head=head)


def test_where_it_is_worked_on() -> None:
    for tied, spec, device in (
        (False, "lm_head=cpu,rest=0", Device("cuda", 0)),
        (False, "lm_head=1,rest=0", Device("cuda", 1)),
        (True, "model.embed_tokens=1,rest=0", Device("cuda", 1)),
        (False, "cpu", Device("cpu")),
    ):
        schedule = resolved(spec, headed(32000, tied=tied), work=WORK).schedule
        assert schedule is not None
        assert schedule.head_device == device, spec
    dense = resolved("0", llama(blocks=2), work=WORK).schedule
    assert dense is not None
    assert dense.head_device is None


def test_its_rows_come_in_pieces() -> None:
    """Twice the rows need no more memory than twice the packed tensors."""
    small, large = (headed(rows) for rows in (8 * HEAD_ROWS, 16 * HEAD_ROWS))
    assert small.head is not None
    assert large.head is not None
    work = WORK.on(small)
    needs = [
        head_work_set(facts, facts.head, work, 2048).total_bytes for facts in (small, large) if facts.head
    ]
    grown = packed_bytes(large.head, work.quantize) - packed_bytes(small.head, work.quantize)
    assert needs[1] - needs[0] == 2 * grown
    assert needs[0] >= max(SOLVE_BYTES, PACK_BYTES) * HEAD_ROWS * 1024


def test_its_device_has_room_for_it() -> None:
    needed, work = {}, replace(WORK, calibration=CalibrationConfig(samples=4, seq_len=128))
    for name, facts in (("dense", llama(blocks=2, vocab=128_000)), ("head", headed(128_000))):
        plans = resolved("0", facts, work=work).devices
        needed[name] = next(plan.needed_bytes for plan in plans if plan.device == "cuda:0")
    assert needed["head"] > needed["dense"]


def test_its_time_is_counted() -> None:
    schedule = resolved("0", headed(32000), work=WORK).schedule
    assert schedule is not None
    with_head = job_seconds(headed(32000), WORK.on(headed(32000)), schedule, SPEED)
    without = job_seconds(llama(blocks=2), WORK.on(llama(blocks=2)), schedule, SPEED)
    tokens, size = 32 * 512, 32000 * 1024
    solve = 2 * (1e-4 * 1024 + 1024**3 / 6 / 1e11) + 1e-8 * size + 8 * size * (1024 - 256) / 1e11
    assert abs(with_head - without - (tokens * 1024**2 / 1e11 + solve)) < 1e-6
