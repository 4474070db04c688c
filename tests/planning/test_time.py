"""The estimate of a job's time: the counting is exact, the probe is sane."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.placement.device import CPU
from gptq_cli.planning.cases import Work
from gptq_cli.planning.time import (
    DISK_BYTES_PER_SECOND,
    MULTIPLY_ADDS,
    START_SECONDS,
    MachineRates,
    job_seconds,
    measure,
)
from tests.preflight.shapes import llama

FACTS = replace(llama(blocks=2, hidden=1024, inner=4096), tensor_files_bytes=5 * 10**8)
WORK = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=10, seq_len=1000))
IDLE = MachineRates(1e30, 1e30, 1e30, 0.0, 0.0)
FIXED = START_SECONDS + 5e8 / DISK_BYTES_PER_SECOND
BLOCK = 4 * 1024**2 + 3 * 1024 * 4096


def test_forward_counts_each_run() -> None:
    speed = replace(IDLE, forward_rate=1e9)
    parked = job_seconds(FACTS, WORK, speed, parked=True) - FIXED
    assert abs(parked - 2 * BLOCK * 10_000 / 1e9) < 1e-6
    qkv, o, gate_up = 3 * 1024**2, 1024**2, 2 * 1024 * 4096
    prefixes = qkv + (qkv + o) + (qkv + o + gate_up) + BLOCK
    replayed = job_seconds(FACTS, WORK, speed, parked=False) - FIXED
    assert abs(replayed - 2 * prefixes * 10_000 / 1e9) < 1e-6


def test_experts_and_sharing_keep_forwards_from_parking() -> None:
    speed = replace(IDLE, forward_rate=1e9)
    together = Work(replace(WORK.quantize, true_sequential=False), WORK.calibration)
    twice = job_seconds(FACTS, together, speed, parked=True) - FIXED
    assert abs(twice - 2 * 2 * BLOCK * 10_000 / 1e9) < 1e-6
    experts = replace(FACTS, linears=tuple(replace(linear, routed=True) for linear in FACTS.linears))
    replayed = job_seconds(experts, WORK, speed, parked=True)
    assert replayed == job_seconds(FACTS, WORK, speed, parked=False)


def test_hessians_and_solves() -> None:
    squares = 3 * 1024**2 + 4096**2
    found = job_seconds(FACTS, WORK, replace(IDLE, hessian_rate=1e9), parked=True) - FIXED
    assert abs(found - 2 * squares * 10_000 / 1e9) < 1e-6
    found = job_seconds(FACTS, WORK, replace(IDLE, column_seconds=1e-3), parked=True) - FIXED
    assert abs(found - 2 * (3 * 1024 + 4096) * 1e-3) < 1e-6
    found = job_seconds(FACTS, WORK, replace(IDLE, weight_seconds=1e-9), parked=True) - FIXED
    assert abs(found - 2 * BLOCK * 1e-9) < 1e-6
    found = job_seconds(FACTS, WORK, replace(IDLE, product_rate=1e9), parked=True) - FIXED
    assert found > 2 * (MULTIPLY_ADDS * BLOCK * 500 + 4096**3) / 1e9


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_dense_target_runs_its_share_twice(share: float) -> None:
    speed = replace(IDLE, forward_rate=1e9)
    text = CalibrationConfig(samples=100, seq_len=100)
    dense = Work(replace(WORK.quantize, solve_for="dense", dense_share=share), text)
    one = job_seconds(FACTS, Work(WORK.quantize, text), speed, parked=True) - FIXED
    assert abs(job_seconds(FACTS, dense, speed, parked=True) - FIXED - (1 + share) * one) < 1e-6


def test_the_probe_measures_without_touching_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    speed = measure(CPU, "bfloat16", QuantizeConfig())
    assert torch.equal(torch.random.get_rng_state(), state)
    for rate in (speed.forward_rate, speed.hessian_rate, speed.product_rate):
        assert 1e6 < rate < 1e15
    assert 0 <= speed.column_seconds < 1
    assert 0 <= speed.weight_seconds < 1e-3
    assert speed.column_seconds + speed.weight_seconds > 0
