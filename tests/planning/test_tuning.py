"""What tuning takes: counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import TensorFact
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement, PlacementEntry
from gptq_cli.placement.schedule import TUNE_LOGITS
from gptq_cli.planning import tuning
from gptq_cli.planning.cases import Work
from gptq_cli.planning.rates import MachineRates
from gptq_cli.planning.time import Done, job_seconds
from gptq_cli.planning.tuning import head_weights, tuning_bytes
from tests.planning.schedules import schedule
from tests.preflight.shapes import llama, mixture, resolved

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


EXPERTS = 8
MIXED = mixture(EXPERTS, H, 512)
ROUTED = 3 * H * 512
"""Weights of one expert."""


def test_experts_count_by_the_tokens_that_come_to_them() -> None:
    work = Work(replace(DENSE, tune_epochs=1), DATA)
    placement = Placement((PlacementEntry("", CPU, MIXED.size_bytes, parameters=True),), CPU, "a test")
    plan = schedule(MIXED, work, parked=True)
    all_tokens = replace(MIXED, routed_share=1.0)
    rows = EXPERTS * (2 * 512 + H)
    more = tuning_bytes(all_tokens, work, placement, plan, CPU) - tuning_bytes(
        MIXED, work, placement, plan, CPU
    )
    assert more == 4 * plan.micro_batch_tokens * tuning.GRADIENT_ROWS * rows * (1 - MIXED.routed_share)
    together = replace(MIXED, linears=tuple(replace(x, together=x.routed) for x in MIXED.linears))
    found, most = (tuning_bytes(x, work, placement, plan, CPU) for x in (together, all_tokens))
    assert found == most, "of experts that are all multiplied at once a row is held for every token"
    steps = tuning.tuning_multiply_adds(all_tokens, work) - tuning.tuning_multiply_adds(MIXED, work)
    forwards = 64 * (tuning.FORWARDS * 14 + tuning.LOOKS * 2)
    assert steps == pytest.approx(forwards * 2 * EXPERTS * ROUTED * (1 - MIXED.routed_share))


def test_a_tensor_that_holds_all_experts_is_packed() -> None:
    work = Work(replace(DENSE, tune_epochs=1), DATA)
    placement = Placement((PlacementEntry("", CPU, MIXED.size_bytes, parameters=True),), CPU, "a test")
    plan = schedule(MIXED, work, parked=True)

    def stack(name: str) -> str:
        return f"{name.partition('.experts.')[0]}.experts.{name.rpartition('.')[2]}"

    linears = [replace(x, part_of=stack(x.name)) if x.routed else x for x in MIXED.linears]
    stacked: dict[str, TensorFact] = {}
    for tensor in MIXED.tensors:
        name = stack(tensor.name.removesuffix(".weight")) if ".experts." in tensor.name else tensor.name
        held = stacked.get(name, TensorFact(name, 0, 0))
        elements, size = held.elements + tensor.elements, held.size_bytes + tensor.size_bytes
        stacked[name] = TensorFact(name, elements, size)
    fused = replace(MIXED, linears=tuple(linears), tensors=tuple(stacked.values()))
    assert len(fused.tensors) < len(MIXED.tensors)
    found, apart = (tuning_bytes(facts, work, placement, plan, CPU) for facts in (fused, MIXED))
    assert found == apart
