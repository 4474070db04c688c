"""What it takes to weigh errors by gradients: counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement, PlacementEntry
from gptq_cli.placement.schedule import PANEL_ROWS, PART_ROWS, PARTS, TUNE_LOGITS, Schedule, panel_rows
from gptq_cli.planning import fisher, tuning
from gptq_cli.planning.cases import Work, gradient_obstacles
from gptq_cli.planning.costs import block_costs
from gptq_cli.planning.memory import work_sets
from gptq_cli.planning.ranks import ranks_plan
from gptq_cli.planning.rates import DISK_BYTES_PER_SECOND, MachineRates
from gptq_cli.planning.schedule import StageShape, block_stages, stages_of
from gptq_cli.planning.time import Done, job_seconds
from tests.planning.schedules import schedule
from tests.preflight.shapes import llama, mixture, resolved

H, INNER, BLOCKS = 1024, 4096, 4
FACTS = llama(blocks=BLOCKS, hidden=H, inner=INNER)
DATA = CalibrationConfig(samples=16, seq_len=64)
ROWS = 5 * H + 2 * INNER
BLOCK = 4 * H**2 + 3 * H * INNER
A = 5 * H**2 + 2 * INNER**2
IDLE = MachineRates(1e30, 1e30, 1e30, 0.0, 0.0)


def work_of(tokens: int, data: CalibrationConfig = DATA) -> Work:
    return Work(QuantizeConfig.of("best", group_size=128, fisher_tokens=tokens), data)


def plan_of(facts: ModelFacts = FACTS) -> Schedule:
    return schedule(facts, work_of(0), parked=True)


def test_whole_samples_of_those_that_the_dense_model_runs_on() -> None:
    assert [fisher.gradient_tokens(work_of(n)) for n in (0, 1, 64, 65, 10**6)] == [0, 64, 64, 128, 16 * 64]


def test_panels_and_parts() -> None:
    assert [panel_rows(n) for n in (64, PANEL_ROWS, PANEL_ROWS + 2, 14_336)] == [
        64,
        PANEL_ROWS,
        PANEL_ROWS // 2 + 1,
        3584,
    ]
    narrow = StageShape(64, 3 * PART_ROWS, outputs=(2 * PART_ROWS, PART_ROWS))
    assert fisher.walks(narrow) == 2  # the parts of all its linears side by side
    assert fisher.walks(StageShape(64, 4096, outputs=(4096,))) == PARTS
    assert fisher.walks(StageShape(64, 4096, family="an expert")) == 1


def test_experts_have_no_output_moment() -> None:
    facts = mixture(4, 512, 1024)
    stages = stages_of(x for x in facts.linears if x.block == "model.layers.0")
    assert [stage.outputs for stage in stages[:2]] == [(512, 512, 512), (512,)]
    assert {stage.outputs for stage in stages[2:]} == {()}
    fused = replace(facts.linears[0], part_of="a stack")
    assert stages_of([fused])[0].outputs == ()


def test_files_in_the_working_folder() -> None:
    assert fisher.file_bytes(FACTS, work_of(0)) == 0
    assert fisher.file_bytes(FACTS, work_of(128)) == (BLOCKS + 1) * 128 * H * 2
    assert fisher.file_bytes(replace(FACTS, dtype="float32"), work_of(128)) == (BLOCKS + 1) * 128 * H * 4


def test_a_solve_holds_what_is_not_solved_yet() -> None:
    plain, weighed = (work_sets(FACTS, work_of(tokens), plan_of())["model.layers.0"] for tokens in (0, 64))
    # its largest moment is the solve of gate and up, before that of down
    assert weighed.hessian_bytes == 8 * H**2 + 4 * (2 * INNER**2 + H**2)
    assert weighed.activation_bytes == plain.activation_bytes
    copies = 4 * 3 * INNER**2  # of both, and one more on its way
    rows = (9 + 4) * 2 * INNER + 14 * 2 * INNER // PARTS
    assert weighed.working_bytes == 2 * BLOCK + rows * H + copies


def test_a_micro_batch_goes_back_through_the_block() -> None:
    data = CalibrationConfig(samples=64, seq_len=2048, batch_size=32)
    work = work_of(2048, data)
    found = work_sets(FACTS, work, schedule(FACTS, work, parked=False))["model.layers.0"]
    assert found.working_bytes == 2 * BLOCK + back(32 * 2048)
    assert found.hessian_bytes == 4 * A


def back(tokens: int) -> int:
    return 2 * tokens * (tuning.GRADIENT_HIDDEN * H + tuning.GRADIENT_ROWS * ROWS)


def test_scores_of_attention_are_in_fp32() -> None:
    eager = replace(FACTS, score_heads=8)
    stages = block_stages(FACTS)["model.layers.0"]
    plain, more = (fisher.block_backward_bytes(facts, stages, 1024, 64) for facts in (FACTS, eager))
    assert plain == back(1024)
    assert more - plain == 4 * 1024 * tuning.GRADIENT_SCORES * 8 * 64


@pytest.mark.parametrize("vocab", [1000, 32_000, 10**6])
def test_the_pass_is_in_a_block_or_behind_them(vocab: int) -> None:
    facts = llama(blocks=BLOCKS, hidden=H, inner=INNER, vocab=vocab)
    placement = Placement((PlacementEntry("", CPU, facts.size_bytes, parameters=True),), CPU, "a test")
    found = fisher.pass_bytes(facts, work_of(128), placement, plan_of(facts), CPU, 2 * BLOCK)
    outside = facts.size_bytes - 2 * BLOCKS * (BLOCK + H)
    logits = tuning.LOGIT_BYTES * min(64 * vocab, TUNE_LOGITS)  # of a sample, or some tokens of it
    inside = 2 * BLOCK + back(plan_of(facts).micro_batch_tokens)
    states = 2 * 128 * H * 2  # on the cpu: also what entered the block that is gone back through
    assert found == states + max(inside, outside + logits)
    assert (found > states + inside) is (vocab > 1000)


def test_a_plan_needs_room_for_the_logits() -> None:
    large, data = llama(blocks=2, hidden=512, inner=1024, vocab=128_000), replace(DATA, seq_len=512)
    plain, weighed = (resolved("cpu", large, work=work_of(tokens, data)) for tokens in (0, 64))
    more = weighed.devices[-1].predicted_peak_bytes - plain.devices[-1].predicted_peak_bytes
    assert more > 1 << 28


def test_time_of_the_pass() -> None:
    """Four forwards of the blocks and three of the head for a token; blocks are read twice."""
    speed = replace(IDLE, forward_rate=1e9)
    plan = plan_of()
    costs = [
        job_seconds(FACTS, work_of(tokens), plan, speed)
        - sum(cost.total for cost in block_costs(FACTS, work_of(tokens), plan, speed).values())
        for tokens in (0, 128)
    ]
    head = FACTS.vocab_size * H
    read = 2 * 2 * BLOCKS * (BLOCK + H) + 4 * (BLOCKS + 1) * 128 * H * 2
    want = 128 * (4 * BLOCKS * BLOCK + 3 * head) / 1e9 + read / DISK_BYTES_PER_SECOND
    assert costs[1] - costs[0] == pytest.approx(want)


@pytest.mark.parametrize(
    ("part", "speed", "want"),
    [
        ("samples", replace(IDLE, forward_rate=1e9), 128 * 3 * BLOCK / 1e9),
        ("samples", replace(IDLE, hessian_rate=1e9), 128 * A / 1e9),
        ("rows", replace(IDLE, matmul_rate=1e9), A / 2 * H / 1e9 + H**2 / 2 * (INNER - H) / 1e9),
        ("factors", replace(IDLE, factor_rate=1e9), (5 * H**3 + 2 * INNER**3) / 3e9),
        ("columns", replace(IDLE, column_seconds=1e-3), (PARTS - 1) * (3 * H + INNER) * 1e-3),
    ],
)
def test_time_in_a_block(part: str, speed: MachineRates, want: float) -> None:
    plain, weighed = (
        block_costs(FACTS, work_of(tokens), plan_of(), speed)["model.layers.0"] for tokens in (0, 128)
    )
    assert getattr(weighed, part) - getattr(plain, part) == pytest.approx(want)


def test_experts_count_for_the_tokens_that_they_see() -> None:
    facts = mixture(4, 512, 1024)
    speed = replace(IDLE, forward_rate=1e9)
    plan = schedule(facts, work_of(0), parked=False)
    plain, weighed = (
        block_costs(facts, work_of(tokens), plan, speed)["model.layers.0"] for tokens in (0, 128)
    )
    run = 4 * 512**2 + 2 * 3 * 512 * 1024  # two experts of four
    assert weighed.samples - plain.samples == pytest.approx(128 * 3 * run / 1e9)


@pytest.mark.parametrize(
    ("facts", "ranks", "why"),
    [
        (replace(FACTS, between="it adds what was there before"), 0, "code runs between its blocks"),
        (replace(FACTS, shared=("model.layers.1.self_attn.q_proj",)), 0, "blocks share weights"),
        (FACTS, 2, "2 processes share the work"),
    ],
)
def test_where_no_gradients_can_be_taken_none_are_asked_for(facts: ModelFacts, ranks: int, why: str) -> None:
    work = replace(work_of(128), ranks=ranks)
    (found,) = gradient_obstacles(facts, ranks)
    assert why in found
    assert work.on(facts).quantize.fisher_tokens == 0
    assert work.on(facts).quantize == replace(work.quantize, fisher_tokens=0)


def test_one_process_of_a_launcher_takes_them() -> None:
    assert gradient_obstacles(FACTS, 1) == ()
    assert replace(work_of(128), ranks=1).on(FACTS).quantize.fisher_tokens == 128


def test_several_processes_are_compared_with_one_that_does_the_same() -> None:
    speed = MachineRates(1e9, 1e9, 1e9, 1e-5, 1e-8)
    plain, weighed = (ranks_plan(FACTS, work_of(tokens), plan_of(), speed, 2) for tokens in (0, 128))
    assert weighed == plain


def test_gradients_that_are_kept_take_no_time_again() -> None:
    speed, plan = replace(IDLE, forward_rate=1e9), plan_of()

    def left(tokens: int, **done: int) -> float:
        return job_seconds(FACTS, work_of(tokens), plan, speed, done=Done(**done))

    whole = left(128) - left(128, gradients=True)
    assert whole == pytest.approx(left(128, blocks=1) - left(128, blocks=1, gradients=True))
    assert whole > 0
    assert left(128, blocks=BLOCKS) == pytest.approx(left(0, blocks=BLOCKS))  # none are taken then
