"""What tuning takes: counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement, PlacementEntry
from gptq_cli.placement.schedule import TUNE_LOGITS
from gptq_cli.planning import tuning
from gptq_cli.planning.cases import Work
from gptq_cli.planning.rates import MachineRates
from gptq_cli.planning.time import Done, job_seconds
from gptq_cli.planning.tuning import head_weights, tuning_bytes
from tests.planning.schedules import schedule
from tests.preflight.shapes import llama, resolved

H, INNER, BLOCKS = 1024, 4096, 4
FACTS = llama(blocks=BLOCKS, hidden=H, inner=INNER)
DENSE = QuantizeConfig.of("best", group_size=128, fisher_tokens=0)
DATA = CalibrationConfig(samples=16, seq_len=64)
BLOCK = 4 * H**2 + 3 * H * INNER
ROWS = 5 * H + 2 * INNER


def test_time() -> None:
    """Four forwards of the blocks and three of the head for a token and an epoch, and three looks."""
    speed = MachineRates(1e9, 1e30, 1e30, 0.0, 0.0)
    plan = schedule(FACTS, Work(DENSE, DATA), parked=True)

    def seconds(epochs: int) -> float:
        return job_seconds(FACTS, Work(replace(DENSE, tune_epochs=epochs), DATA), plan, speed)

    head = head_weights(FACTS)
    looks = 3 * 2 * (BLOCKS * BLOCK + 2 * head)
    step = 14 * (4 * BLOCKS * BLOCK + 3 * head)
    assert seconds(1) - seconds(0) == pytest.approx(64 * (looks + step) / 1e9)
    assert seconds(3) - seconds(1) == pytest.approx(64 * 2 * step / 1e9)
    one = Work(replace(DENSE, tune_epochs=1), DATA)
    assert job_seconds(FACTS, one, plan, speed, done=Done(tuned=True)) == pytest.approx(seconds(0))


def test_memory() -> None:
    work = Work(replace(DENSE, tune_epochs=1), DATA)
    placement = Placement((PlacementEntry("", CPU, FACTS.size_bytes, parameters=True),), CPU, "a test")
    packed = 2 * BLOCKS * BLOCK
    decoded = (tuning.DECODED_BYTES + 2 * tuning.DECODED_COPIES) * BLOCK
    micro_batch = 1024  # all there is
    backward = 4 * micro_batch * (tuning.GRADIENT_HIDDEN * H + tuning.GRADIENT_ROWS * ROWS)
    scales = tuning.MOVING_BYTES * BLOCKS * BLOCK // 128
    states = 2 * H * (16 * 64 + (BLOCKS + 2) * 2048)
    want = FACTS.size_bytes - packed + decoded + backward + scales + states
    want += tuning.LOGIT_BYTES * TUNE_LOGITS
    plan = schedule(FACTS, work, parked=True)
    found = tuning_bytes(FACTS, work, placement, plan, CPU)
    assert found == want + (plan.micro_batch_tokens - 1024) * (backward // 1024)


def test_scores_of_attention_count_where_they_are_tensors() -> None:
    work = Work(replace(DENSE, tune_epochs=1), DATA)
    placement = Placement((PlacementEntry("", CPU, FACTS.size_bytes, parameters=True),), CPU, "a test")
    plan = schedule(FACTS, work, parked=True)
    eager = replace(FACTS, score_heads=8)
    more = tuning_bytes(eager, work, placement, plan, CPU) - tuning_bytes(FACTS, work, placement, plan, CPU)
    assert more == 4 * plan.micro_batch_tokens * tuning.GRADIENT_SCORES * 8 * 64


def test_a_plan_needs_room_for_it() -> None:
    large = llama(blocks=2, hidden=512, inner=1024, vocab=128_000)
    plain, tuned = (
        resolved("cpu", large, work=Work(replace(DENSE, tune_epochs=epochs), DATA)) for epochs in (0, 1)
    )
    assert tuned.devices[-1].predicted_peak_bytes > plain.devices[-1].predicted_peak_bytes + (1 << 28)
