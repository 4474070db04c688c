"""The estimate of a job's time: the counting is exact, the probe is sane."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.devices.disk import LEAST_BYTES
from gptq_cli.model.facts import DecodedSource, LinearFact, ModelFacts
from gptq_cli.placement.cards import CARDS
from gptq_cli.placement.device import CPU, Device
from gptq_cli.planning import rates as rates_module
from gptq_cli.planning.cases import Work
from gptq_cli.planning.costs import MULTIPLY_ADDS
from gptq_cli.planning.rates import DISK_BYTES_PER_SECOND, MachineRates, measure, rates, rates_of
from gptq_cli.planning.time import (
    DECODED_PER_SECOND,
    START_SECONDS,
    Done,
    Estimate,
    estimate,
    job_seconds,
    quick_estimate,
    time_words,
)
from tests.planning.schedules import schedule
from tests.preflight.shapes import llama

FACTS = replace(llama(blocks=2, hidden=1024, inner=4096), tensor_files_bytes=5 * 10**8)
WORK = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=10, seq_len=1000))
IDLE = MachineRates(1e30, 1e30, 1e30, 0.0, 0.0)
FIXED = START_SECONDS + 5e8 / DISK_BYTES_PER_SECOND
BLOCK = 4 * 1024**2 + 3 * 1024 * 4096


def seconds(facts: ModelFacts, work: Work, speed: MachineRates, *, parked: bool) -> float:
    return job_seconds(facts, work, schedule(facts, work, parked=parked), speed)


def test_forward_counts_each_run() -> None:
    speed = replace(IDLE, forward_rate=1e9)
    parked = seconds(FACTS, WORK, speed, parked=True) - FIXED
    assert abs(parked - 2 * BLOCK * 10_000 / 1e9) < 1e-6
    qkv, o, gate_up = 3 * 1024**2, 1024**2, 2 * 1024 * 4096
    prefixes = qkv + (qkv + o) + (qkv + o + gate_up) + BLOCK
    replayed = seconds(FACTS, WORK, speed, parked=False) - FIXED
    assert abs(replayed - 2 * prefixes * 10_000 / 1e9) < 1e-6


def test_reading_ahead_takes_no_time_of_its_own_while_the_work_lasts() -> None:
    """Of two blocks one is read while the other is worked on."""
    plan = schedule(FACTS, WORK, parked=True, reads_ahead=True)
    block = 2 * BLOCK + 2 * 1024
    share = 5e8 * block / FACTS.size_bytes / DISK_BYTES_PER_SECOND
    slow = replace(IDLE, forward_rate=1e9)
    waits = job_seconds(FACTS, WORK, schedule(FACTS, WORK, parked=True), slow)
    assert waits - job_seconds(FACTS, WORK, plan, slow) == pytest.approx(share)
    assert job_seconds(FACTS, WORK, plan, IDLE) == pytest.approx(FIXED), "there is no work to hide it behind"


def test_what_travels_to_an_accelerator_takes_time() -> None:
    made = schedule(FACTS, WORK, parked=False)
    on_card = replace(
        made, blocks=tuple(replace(block, execution_device=Device("cuda", 0)) for block in made.blocks)
    )
    slow = replace(IDLE, link_rate=1e6)
    weights = 2 * 2 * BLOCK / 1e6
    assert job_seconds(FACTS, WORK, made, slow) == pytest.approx(FIXED)
    assert job_seconds(FACTS, WORK, on_card, slow) == pytest.approx(FIXED + weights)
    resting = tuple(replace(block, activations_on_host=True) for block in on_card.blocks)
    hidden = 10_000 * 1024 * 2 / 1e6
    found = job_seconds(FACTS, WORK, replace(on_card, blocks=resting), slow)
    assert found == pytest.approx(FIXED + weights + 2 * (4 + 2) * hidden), "four stages, in and out"


def test_a_card_that_is_not_there_is_counted_from_its_data_sheet() -> None:
    plan = schedule(FACTS, WORK, parked=True)
    found = {card: estimate(FACTS, WORK, plan, rates_of(CARDS[card])) for card in CARDS}
    assert found["h100"].seconds < found["4090"].seconds < found["t4"].seconds
    assert found["4090"].source == (
        "from data sheets, 50% of it reached (30% in factorisations): 4090: 165 TFLOP/s bf16, 83 fp32, "
        "1008 GB/s memory, 25 GB/s from main memory; disk 2 GB/s; nothing of it was measured"
    )


def test_models_on_a_card_are_estimated_near_what_its_arithmetic_allows() -> None:
    """Beside the limits of scripts/bench_gpu.py for an H100: half of the rates, so twice the time and what is
    around it."""
    work = Work(QuantizeConfig.of("fast", solve_for="own"), CalibrationConfig(samples=128, seq_len=2048))
    for facts, limit in (
        (llama(blocks=32, hidden=4096, inner=14336, vocab=128256), 15.9),
        (llama(blocks=80, hidden=8192, inner=28672, vocab=128256), 174.1),
    ):
        plan = schedule(facts, work, parked=True, reads_ahead=True)
        assert 1 < estimate(facts, work, plan, rates_of(CARDS["h100"])).seconds / limit < 3


def test_columns_cost_launches_where_no_kernel_walks_them() -> None:
    launched = rates_of(CARDS["v100"]).column_seconds
    assert launched > 5 * rates_of(CARDS["a100"]).column_seconds
    assert rates_of(replace(CARDS["v100"], fused=True)).column_seconds < launched


def test_factorising_has_a_rate_of_its_own() -> None:
    plan = schedule(FACTS, WORK, parked=True)
    slow = replace(IDLE, factor_rate=1e9)
    more = job_seconds(FACTS, WORK, plan, slow) - job_seconds(FACTS, WORK, plan, IDLE)
    assert more == pytest.approx(2 * (3 * 1024**3 + 4096**3) / 6 / 1e9)


def test_the_disk_is_what_the_models_files_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "measure", lambda *words, **options: IDLE)
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"few")
    few = rates(CPU, FACTS, WORK, shards=[shard])
    assert few.disk_rate == DISK_BYTES_PER_SECOND
    assert (
        "0.5 GB/s from the disk are assumed"
        in estimate(FACTS, WORK, schedule(FACTS, WORK, parked=True), few).source
    )
    with shard.open("ab") as file:
        file.truncate(LEAST_BYTES)
    found = rates(CPU, FACTS, WORK, shards=[shard])
    assert found.disk_measured
    assert found.disk_rate != DISK_BYTES_PER_SECOND
    source = estimate(FACTS, WORK, schedule(FACTS, WORK, parked=True), found).source
    assert source.endswith("GB/s are what the model's files give")


def test_weights_in_few_bits_take_time_to_decode() -> None:
    decoded = DecodedSource(formats=("mxfp4",), tensors=8, elements=3 * 10**8)
    more = seconds(replace(FACTS, decoded=decoded), WORK, IDLE, parked=True)
    assert more - FIXED == pytest.approx(3e8 / DECODED_PER_SECOND)


def test_stages_that_are_collected_together_take_one_pass_and_one_to_the_end() -> None:
    together = Work(replace(WORK.quantize, true_sequential=False), WORK.calibration)
    twice = seconds(FACTS, together, replace(IDLE, forward_rate=1e9), parked=True) - FIXED
    assert abs(twice - 2 * 2 * BLOCK * 10_000 / 1e9) < 1e-6


def test_experts_take_a_pass_per_batch() -> None:
    """Eight experts of 16384 columns, 1 GiB of Hessian each: a batch each; the others come in one pass."""
    speed = replace(IDLE, forward_rate=1e9)
    wide, narrow = (
        tuple(
            LinearFact(
                name=f"model.layers.{block}.experts.{index}.{name}",
                block=f"model.layers.{block}",
                in_features=k,
                out_features=64,
                stage=4 + index + offset,
                routed=True,
            )
            for block in range(2)
            for index in range(8)
        )
        for name, k, offset in (("down", 16384, 0), ("up", 1024, 8))
    )
    facts = replace(FACTS, linears=(*FACTS.linears, *wide, *narrow))
    qkv, o, gate_up = 3 * 1024**2, 1024**2, 2 * 1024 * 4096
    block = BLOCK + 8 * 64 * (16384 + 1024)
    run = qkv + (qkv + o) + (qkv + o + gate_up) + (8 + 1 + 1) * block
    for parked in (True, False):
        found = seconds(facts, WORK, speed, parked=parked) - FIXED
        assert abs(found - 2 * run * 10_000 / 1e9) < 1e-6


def test_experts_count_by_the_tokens_that_are_routed_to_them() -> None:
    expert = LinearFact(
        name="model.layers.0.experts.0.up",
        block="model.layers.0",
        in_features=2048,
        out_features=64,
        stage=4,
        routed=True,
    )
    facts = replace(FACTS, linears=(*FACTS.linears, expert))
    few = replace(facts, routed_share=0.25)
    collect, forward = replace(IDLE, hessian_rate=1e9), replace(IDLE, forward_rate=1e9)
    saved = seconds(facts, WORK, collect, parked=True) - seconds(few, WORK, collect, parked=True)
    assert abs(saved - 0.75 * 2048**2 * 10_000 / 1e9) < 1e-6
    saved = seconds(facts, WORK, forward, parked=True) - seconds(few, WORK, forward, parked=True)
    assert abs(saved - 0.75 * 2 * 2048 * 64 * 10_000 / 1e9) < 1e-6


def test_experts_that_are_solved_side_by_side_walk_their_columns_once() -> None:
    """60 of 1024 columns and 256 rows, a family of one shape: a CPU solves 16 side by side."""
    experts = tuple(
        LinearFact(
            name=f"model.layers.0.experts.{index}.up",
            block="model.layers.0",
            in_features=1024,
            out_features=256,
            stage=4 + index,
            routed=True,
        )
        for index in range(60)
    )
    speed = replace(IDLE, column_seconds=1e-3)
    facts = replace(FACTS, linears=(*FACTS.linears, *experts))
    more = seconds(facts, WORK, speed, parked=True) - seconds(FACTS, WORK, speed, parked=True)
    assert abs(more - 4 * 1024 * 1e-3) < 1e-6


def test_hessians_and_solves() -> None:
    squares = 3 * 1024**2 + 4096**2
    found = seconds(FACTS, WORK, replace(IDLE, hessian_rate=1e9), parked=True) - FIXED
    assert abs(found - 2 * squares * 10_000 / 1e9) < 1e-6
    found = seconds(FACTS, WORK, replace(IDLE, column_seconds=1e-3), parked=True) - FIXED
    assert abs(found - 2 * (3 * 1024 + 4096) * 1e-3) < 1e-6
    found = seconds(FACTS, WORK, replace(IDLE, weight_seconds=1e-9), parked=True) - FIXED
    assert abs(found - 2 * BLOCK * 1e-9) < 1e-6
    found = seconds(FACTS, WORK, replace(IDLE, matmul_rate=1e9), parked=True) - FIXED
    assert found > 2 * (MULTIPLY_ADDS * BLOCK * 500 + 4096**3) / 1e9


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_dense_target_runs_its_share_twice(share: float) -> None:
    speed = replace(IDLE, forward_rate=1e9)
    text = CalibrationConfig(samples=3200, seq_len=100)
    dense = Work(replace(WORK.quantize, solve_for="dense", dense_share=share), text)
    one = seconds(FACTS, Work(WORK.quantize, text), speed, parked=True) - FIXED
    assert abs(seconds(FACTS, dense, speed, parked=True) - FIXED - (1 + share) * one) < 1e-6


def test_the_probe_measures_without_touching_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    speed = measure(CPU, "bfloat16", QuantizeConfig())
    assert torch.equal(torch.random.get_rng_state(), state)
    for rate in (speed.forward_rate, speed.hessian_rate, speed.matmul_rate):
        assert 1e6 < rate < 1e15
    assert 0 <= speed.column_seconds < 1
    assert 0 <= speed.weight_seconds < 1e-3
    assert speed.column_seconds + speed.weight_seconds > 0


def test_finished_blocks_take_no_time_any_more() -> None:
    speed = replace(IDLE, forward_rate=1e9)
    plan = schedule(FACTS, WORK, parked=True)
    whole = job_seconds(FACTS, WORK, plan, speed) - FIXED
    assert job_seconds(FACTS, WORK, plan, speed, done=Done(blocks=1)) - FIXED == pytest.approx(whole / 2)
    assert job_seconds(FACTS, WORK, plan, speed, done=Done(blocks=2)) == pytest.approx(FIXED)


def test_a_header_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a probe where no machine takes long."""
    probes: list[str] = []

    def probed(*_: object, **__: object) -> MachineRates:
        probes.append("probed")
        return replace(IDLE, forward_rate=1e9)

    monkeypatch.setattr("gptq_cli.planning.rates.measure", probed)
    tiny = llama(blocks=2, hidden=64, inner=128)
    short = Work(WORK.quantize, CalibrationConfig(samples=2, seq_len=16))
    quick = quick_estimate(tiny, short, schedule(tiny, short, parked=True), CPU)
    assert (quick, time_words(quick)) == (None, "less than a minute")
    assert probes == []
    found = quick_estimate(FACTS, WORK, schedule(FACTS, WORK, parked=True), CPU)
    assert (time_words(found), probes) == ("about 6 min", ["probed"])
    left = quick_estimate(FACTS, WORK, schedule(FACTS, WORK, parked=True), CPU, done=Done(blocks=1))
    assert found is not None
    assert left is not None
    assert left.left_seconds < left.seconds == found.seconds
    assert sum(found.block_seconds.values()) < found.seconds


def test_a_busy_machine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks are those of a machine on which every thread waits as long as it works."""
    waited = iter((1.0, 4.0))
    worked = iter((10.0, 13.0))
    monkeypatch.setattr("gptq_cli.planning.rates.waited_seconds", lambda: next(waited))
    monkeypatch.setattr("gptq_cli.planning.rates.process_time", lambda: next(worked))
    found = measure(CPU, "float32", WORK.quantize, attempts=1, min_seconds=0.0)
    assert found.waited_share == 0.5
    busy = Estimate(seconds=900.0, left_seconds=600.0, block_seconds={}, waited_share=found.waited_share)
    assert time_words(busy) == (
        "about 10 min (other work keeps the processors busy: the probe waited for one 50% of its time)"
    )
    for share in (None, 0.1):
        assert time_words(replace(busy, waited_share=share)) == "about 10 min"


def test_where_waiting_is_not_known_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_cli.planning.rates.waited_seconds", lambda: None)
    assert measure(CPU, "float32", WORK.quantize, attempts=1, min_seconds=0.0).waited_share is None
