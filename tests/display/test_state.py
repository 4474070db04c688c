"""Events fold into the state that displays draw."""

from gptq_cli import events as e
from gptq_cli.display.state import REMEMBERED, State, advance
from tests.display.events import STAGES, linear, memory, sample_run


def after(until: type[e.Event], nth: int = 1, blocks: int = 3) -> tuple[State, float]:
    """The state just after the `nth` event of type `until`, and when that was."""
    state, now = State(since=0.0), 0.0
    for now, event in sample_run(blocks):
        state = advance(state, event, now)
        if isinstance(event, until):
            nth -= 1
            if nth == 0:
                break
    return state, now


def test_a_phase_counts_from_its_start() -> None:
    state, now = after(e.PhaseAdvanced, nth=2)
    assert state.phase is not None
    assert (state.phase.phase, state.phase.done, state.phase.total) == ("capture", 64, 128)
    assert now - state.phase.since == 1.5
    assert after(e.PhaseFinished, nth=2)[0].phase is None


def test_a_block_counts_samples_and_linears() -> None:
    state, _ = after(e.LinearQuantized, nth=4)
    assert state.block is not None
    assert (state.block.linears_done, state.block.linears) == (4, 7)
    assert (state.block.stage, state.block.stages, state.block.samples_done) == (1, 4, 128)
    assert [item.report.name.rpartition(".")[2] for item in state.recent] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]


def test_remaining_time_comes_from_finished_blocks() -> None:
    state, now = after(e.LinearQuantized, nth=7)
    assert state.remaining_seconds(now) is None
    state, now = after(e.BlockFinished, nth=1)
    block_seconds = 4 * 2 * 0.5 + 7 * 0.3
    assert abs((state.remaining_seconds(now) or 0) - 2 * block_seconds) < 1e-6
    state, now = after(e.BlockStarted, nth=2)
    assert abs((state.remaining_seconds(now + 1) or 0) - (2 * block_seconds - 1)) < 1e-6
    assert abs((state.remaining_seconds(now + 1000) or 0) - block_seconds) < 1e-6


def test_fallbacks_are_counted() -> None:
    state, _ = after(e.RunFinished)
    assert (state.fallbacks, state.linears_done, state.finished) == (1, 21, True)


def test_memory_is_the_latest_of_each_device() -> None:
    state, _ = after(e.CacheFlushed, nth=2)
    assert state.memory == memory(0)
    assert state.flush is not None
    assert state.flush.subject == "model.layers.0"


def test_only_the_last_linears_are_kept() -> None:
    state = State(since=0.0)
    for index in range(REMEMBERED + 3):
        report = linear(f"h.{index}", STAGES[0][0], index)
        state = advance(state, e.LinearQuantized(f"h.{index}", report), 0.0)
    assert [item.block for item in state.recent] == [f"h.{i}" for i in range(3, REMEMBERED + 3)]


def test_samples_without_a_block_change_nothing() -> None:
    state = State(since=0.0)
    event = e.SamplesAdvanced(block="h.0", stage=0, stages=1, done=1, total=2)
    assert advance(state, event, 1.0) is state


def test_a_head_is_no_linear_of_the_block_before_it() -> None:
    state = advance(State(since=0.0), e.BlockStarted(
        name="h.0", index=0, total=1, device="cpu", stages=(("a",),)), 0.0)  # fmt: skip
    done = advance(state, e.LinearQuantized("", linear("h.0", "mlp.up_proj", 0)), 1.0)
    assert done.block is not None
    assert (done.block.linears_done, done.linears_done) == (0, 1)


def test_waiting_for_ranks_ends_when_they_have_come() -> None:
    state = advance(State(since=0.0), e.RanksWaited(seconds=3.0, ranks=("rank 1 on b",)), 10.0)
    assert state.waiting is not None
    assert (state.waiting.ranks, state.waiting.since) == (("rank 1 on b",), 7.0)
    assert advance(state, e.RanksWaited(seconds=4.0, ranks=(), over=True), 11.0).waiting is None
