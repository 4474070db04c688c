"""The formulae of the budget, recomputed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import DecodedSource, LinearFact
from gptq_cli.placement.device import CPU
from gptq_cli.placement.schedule import SOLVE_BYTES
from gptq_cli.planning import memory as budget
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import (
    CHUNK_BYTES,
    IN_FLIGHT_COLUMNS,
    IN_FLIGHT_HIDDEN,
    IN_FLIGHT_ROWS,
    SCORE_BYTES,
    packed_bytes,
    quantized_bytes,
    work_sets,
)
from gptq_cli.planning.schedule import StageShape, block_stages
from tests.planning.schedules import schedule
from tests.preflight.shapes import llama, resolved

H, INNER = 1024, 4096
FACTS = llama(hidden=H, inner=INNER)


def one(work: Work, *, parked: bool = False) -> budget.WorkSet:
    return work_sets(FACTS, work, schedule(FACTS, work, parked=parked))["model.layers.3"]


def test_solve_is_the_largest_moment_of_a_short_calibration() -> None:
    found = one(Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=8, seq_len=128)))
    assert found.working_bytes + found.hessian_bytes == max(
        SOLVE_BYTES * INNER * H + 8 * INNER**2, SOLVE_BYTES * 2 * INNER * H + 8 * H**2
    )
    assert found.activation_bytes == 8 * 128 * H * 2


def test_collecting_is_the_largest_moment_of_a_large_micro_batch() -> None:
    work = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=64, seq_len=2048, batch_size=32))
    t = 32 * 2048
    found = one(work)
    assert found.working_bytes == t * 2 * (IN_FLIGHT_HIDDEN * H + IN_FLIGHT_ROWS * 2 * INNER) + CHUNK_BYTES
    assert found.hessian_bytes == 4 * INNER**2


def test_an_mlp_without_a_gate_has_an_activation_function_of_several_steps() -> None:
    work = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=64, seq_len=2048, batch_size=32))
    plain = replace(FACTS, linears=tuple(x for x in FACTS.linears if not x.name.endswith("up_proj")))
    found = work_sets(plain, work, schedule(plain, work, parked=False))["model.layers.3"]
    assert (
        found.working_bytes
        == 32 * 2048 * 2 * (IN_FLIGHT_HIDDEN * H + IN_FLIGHT_COLUMNS * INNER) + CHUNK_BYTES
    )


def test_scores_that_are_tensors_count_in_flight_and_where_forwards_wait() -> None:
    work = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=64, seq_len=2048, batch_size=32))
    eager = replace(FACTS, score_heads=8, scores_kept=2)
    parked, replayed = (
        work_sets(eager, work, schedule(eager, work, parked=parked))["model.layers.3"]
        for parked in (True, False)
    )
    pairs = 8 * 2048 * 2048  # of tokens, in every head
    assert replayed.working_bytes - one(work).working_bytes == 32 * pairs * SCORE_BYTES
    held = 64 * 2048 * 2 * (H + 4 * H) + 64 * pairs * 2 * 2  # normed input, q, k, v and o's input; scores
    assert parked.activation_bytes - replayed.activation_bytes == held


def test_parked_forwards_hold_the_residual_the_normed_and_the_widest_input() -> None:
    work = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=64, seq_len=512))
    parked, replayed = one(work, parked=True), one(work)
    assert parked.activation_bytes - replayed.activation_bytes == 64 * 512 * (2 * H + INNER) * 2


def test_parked_forwards_hold_the_outputs_of_attention_where_they_are_wider() -> None:
    work = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=64, seq_len=512))
    narrow = llama(hidden=H, inner=H)
    sets = work_sets(narrow, work, schedule(narrow, work, parked=True))
    parked = sets["model.layers.0"].activation_bytes
    assert parked == 64 * 512 * 2 * (2 * H + 3 * H + H)


@pytest.mark.parametrize(("seq_len", "factor"), [(512, 2), (4096, 1)])
def test_small_pieces_on_the_c_heap_cost_twice(seq_len: int, factor: int) -> None:
    facts = llama(hidden=576, inner=1536)
    work = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=32, seq_len=seq_len))
    made = resolved("cpu", facts, "cpu=64GiB", work=work)
    needed = work_sets(facts, work, schedule(facts, work, parked=True))["model.layers.0"].activation_bytes
    assert made.schedule is not None
    assert all(block.parked for block in made.schedule.blocks)
    assert made.devices[0].activation_bytes == factor * needed


def test_without_true_sequential_all_hessians_of_a_block_are_there() -> None:
    data = CalibrationConfig(samples=8, seq_len=128)
    together = one(Work(QuantizeConfig(true_sequential=False, solve_for="own"), data), parked=True)
    stepwise = one(Work(QuantizeConfig(solve_for="own"), data))
    assert together.total_bytes - stepwise.total_bytes == 4 * 3 * H**2
    assert together.activation_bytes == stepwise.activation_bytes


def test_experts_are_collected_in_batches_and_solved_side_by_side() -> None:
    """32 experts of 2 x 128 rows and 2048 columns: 31 are collected at a time, 14 are solved side by side."""
    k, rows, experts = 2048, 256, 32
    linears = tuple(
        LinearFact(
            name=f"model.layers.0.experts.{index}.{kind}",
            block="model.layers.0",
            in_features=k,
            out_features=rows // 2,
            stage=9 + index,
            routed=True,
        )
        for index in range(experts)
        for kind in ("gate", "up")
    )
    facts = replace(FACTS, linears=linears)
    work = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=8, seq_len=16))
    made = schedule(facts, work, parked=True)
    block = replace(
        made.block("model.layers.0"), expert_batch_bytes=31 * 4 * k**2, solve_batch_rows=14 * rows
    )
    (stage,) = set(block_stages(facts)["model.layers.0"])
    assert stage == StageShape(k, rows, "model.layers.*.experts.*.gate", alone=False)
    found = budget.work_set(facts, (stage,) * experts, work, block, 128)
    assert block.experts_per_solve(k, rows) == 12, "8 MiB of Hessians and factors, 14 bytes per weight"
    assert found.hessian_bytes == 4 * k**2 * (31 + 1 + 12 + 1)
    assert found.working_bytes == SOLVE_BYTES * 12 * rows * k
    few = replace(block, solve_batch_rows=1)
    found = budget.work_set(facts, (stage,) * 5, work, few, 128)
    assert found.hessian_bytes == 4 * k**2 * (5 + 1 + 1 + 1)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_solving_for_the_dense_output_holds_a_second_stream(share: float) -> None:
    data = CalibrationConfig(samples=32768, seq_len=16)
    own = one(Work(QuantizeConfig(solve_for="own"), data), parked=True)
    dense = one(Work(QuantizeConfig(solve_for="dense", dense_share=share), data), parked=True)
    assert dense.activation_bytes == (1 + share) * own.activation_bytes
    assert dense.hessian_bytes == 4 * (4 * INNER**2 + 2 * H * INNER), "what the outputs lack is (N, K)"
    linears = 2 * (4 * H**2 + 3 * H * INNER)
    assert dense.working_bytes == linears + budget.GOAL_BYTES * H * INNER


def test_weights_in_few_bits_are_decoded_where_they_are_worked_on() -> None:
    decoded = DecodedSource(formats=("nvfp4",), tensors=8, elements=10**6, working_bytes=5 << 30)
    for spec in ("0", "cpu"):
        plain = {p.device: p for p in resolved(spec, FACTS).devices}
        coded = {p.device: p for p in resolved(spec, replace(FACTS, decoded=decoded)).devices}
        for device in plain:
            assert coded[device].working_bytes == 5 << 30 > plain[device].working_bytes


def test_of_what_is_stored_in_few_bits_only_these_are_read_ahead() -> None:
    decoded = DecodedSource(formats=("fp8",), tensors=8, elements=10**6)
    whole = sum(t.size_bytes for t in FACTS.tensors if not t.buffer)
    half = replace(FACTS, decoded=decoded, tensor_files_bytes=whole // 2)
    (plain,), (coded,) = (resolved("cpu", facts, "cpu=64GiB").devices for facts in (FACTS, half))
    assert coded.ahead_bytes == plain.ahead_bytes // 2
    assert coded.weights_bytes == plain.weights_bytes


def test_an_offloaded_block_is_moved_to_the_main_device() -> None:
    streamed = {p.device: p for p in resolved("0", FACTS).devices}
    moved = {p.device: p for p in resolved("model.layers.11=cpu,rest=0", FACTS).devices}
    block = sum(t.size_bytes for t in FACTS.tensors if t.name.startswith("model.layers.11."))
    assert moved["cuda:0"].weights_bytes == streamed["cuda:0"].weights_bytes == block
    assert moved["cuda:0"].working_bytes - streamed["cuda:0"].working_bytes == block
    assert moved["cpu"].weights_bytes == block
    assert moved["cpu"].hessian_bytes == 0


def test_an_offloaded_embedding_counts_only_beyond_the_work() -> None:
    resident = {p.device: p for p in resolved("0", FACTS).devices}
    moved = {p.device: p for p in resolved("model.embed_tokens=cpu,rest=0", FACTS).devices}
    assert moved["cuda:0"].working_bytes == resident["cuda:0"].working_bytes


def test_a_device_without_blocks_needs_no_work_set() -> None:
    plans = {p.device: p for p in resolved("lm_head=1,rest=0", FACTS).devices}
    assert plans["cuda:1"].hessian_bytes == plans["cuda:1"].activation_bytes == 0
    assert plans["cuda:0"].hessian_bytes > 0


def test_measured_figures_know_no_device_context() -> None:
    plans = {p.device: p for p in resolved("0", FACTS).devices}
    assert (
        plans["cuda:0"].predicted_peak_bytes == plans["cuda:0"].needed_bytes - plans["cuda:0"].baseline_bytes
    )
    assert plans["cpu"].predicted_peak_bytes == plans["cpu"].needed_bytes


def test_a_host_that_was_not_described_has_no_plan() -> None:
    assert [p.device for p in resolved("0", FACTS, "cuda:0=24GiB").devices] == ["cuda:0"]
    assert [p.device for p in resolved("0", FACTS, f"cuda:0=24GiB,{CPU}=8GiB").devices] == ["cuda:0", "cpu"]


@pytest.mark.parametrize(
    ("bits", "group_size", "size"),
    [
        (4, 128, 4 * (128 * 4096 + 8 * 512 + 1024) + 2 * 8 * 4096),
        (3, -1, 4 * (96 * 4096 + 1 * 384 + 1024) + 2 * 4096),
        (8, 64, 4 * (256 * 4096 + 16 * 1024 + 1024) + 2 * 16 * 4096),
    ],
)
def test_packed_bytes(bits: int, group_size: int, size: int) -> None:
    linear = next(x for x in FACTS.linears if x.name.endswith("gate_proj"))
    assert packed_bytes(linear, QuantizeConfig(bits=bits, group_size=group_size)) == size


def test_size_of_the_result() -> None:
    config = QuantizeConfig(solve_for="own", group_size=128)
    dense = FACTS.size_bytes - 128
    linears = sum(2 * x.in_features * x.out_features for x in FACTS.linears)
    assert quantized_bytes(FACTS, config) == dense - linears + sum(
        packed_bytes(x, config) for x in FACTS.linears
    )
    assert quantized_bytes(FACTS, QuantizeConfig(solve_for="own")) == quantized_bytes(FACTS, config)


def test_more_positions_than_linears() -> None:
    bare = replace(FACTS, linears=())
    work = Work(QuantizeConfig(solve_for="own"), CalibrationConfig())
    assert work_sets(bare, work, schedule(bare, work, parked=True))["model.layers.0"].total_bytes == 0


def test_there_are_no_snapshots_of_forwards_that_are_kept_open() -> None:
    facts, work = llama(), Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=8, seq_len=64))
    assert budget.snapshot_bytes(facts, work) == 8 * 64 * facts.hidden_size * facts.dtype_bytes
    assert budget.snapshot_bytes(replace(facts, between="it adds what was there before"), work) == 0


def test_a_large_tokenizer_counts() -> None:
    plans = [resolved("cpu", replace(FACTS, vocab_size=size)).devices[-1] for size in (512, 50_000, 262_144)]
    small, usual, large = (plan.baseline_bytes for plan in plans)
    assert small == usual == budget.CPU_BASELINE_BYTES
    assert large - usual == 212_144 * budget.TOKENIZER_BYTES
    assert plans[2].needed_bytes - plans[1].needed_bytes == large - usual
