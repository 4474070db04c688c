"""One line an event."""

import io
from dataclasses import replace

from gptq_cli import events as e
from gptq_cli.display.plain import HEARTBEAT_SECONDS, PlainDisplay, flush_text, lines
from tests.display.events import memory, sample_run
from tests.golden import check_golden


class Clock:
    """Time that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_log_of_a_whole_run() -> None:
    clock, stream = Clock(), io.StringIO()
    with PlainDisplay(stream, clock) as display:
        for clock.now, event in sample_run(2):
            display(event)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    check_golden("plain_run.txt", text)


def test_samples_get_no_lines_but_a_long_stage_is_not_silent() -> None:
    clock, stream = Clock(), io.StringIO()
    display = PlainDisplay(stream, clock)
    for done in range(1, 100):
        clock.now = float(done)
        display(e.SamplesAdvanced(block="h.0", stage=0, stages=4, done=done, total=128))
    written = stream.getvalue().splitlines()
    assert len(written) == 99 // HEARTBEAT_SECONDS
    assert written[0] == "[0:00:30] h.0 stage 1/4: sample 30/128"


def test_every_fallback_is_a_word() -> None:
    text = "\n".join(line for _, event in sample_run(2) for line in lines(event))
    assert text.count("FALLBACK to rtn") == 1


def test_a_flush_that_gives_nothing_back_says_so() -> None:
    held = memory(0)
    event = e.CacheFlushed(where="end", subject="", before=held, after=held)
    assert flush_text(event) == "gave back 0 B"


def test_a_long_text_is_not_silent() -> None:
    assert lines(e.TextGenerated("Once upon", 3)) == ()
    assert lines(e.TextGenerated(" a time", 5), heartbeat=True) == ("generate: 5 tokens",)


def test_a_phase_without_a_total() -> None:
    assert lines(e.PhaseAdvanced("generate", 3), heartbeat=True) == ("generate: 3",)
    assert lines(e.PhaseAdvanced("generate", 3)) == ()
    assert lines(e.PhaseAdvanced("download", 3 << 30, 15 << 30, 75.0), heartbeat=True) == (
        "download: 3.00 GiB/15.0 GiB, 0:01:15 left",
    )


def test_the_time_left_is_said_at_the_first_step_of_what_takes_long() -> None:
    first = e.PhaseAdvanced("evaluate", 1, 64, 600.0)
    assert lines(first) == ("evaluate: 1/64, 0:10:00 left",)
    assert lines(e.PhaseAdvanced("evaluate", 2, 64, 590.0)) == ()
    assert lines(e.PhaseAdvanced("evaluate", 2, 64, 590.0), heartbeat=True) == (
        "evaluate: 2/64, 0:09:50 left",
    )
    assert lines(e.PhaseAdvanced("evaluate", 1, 64, 5.0)) == ()


def ranks_reported(count: int = 2, waited: float = 3.0) -> e.RanksReported:
    """Rank 1 is the slowest; the device of the last one is the fullest."""
    states = []
    for rank in range(count):
        device, cpu = memory(rank)
        waits = 0.5 if rank == 1 else waited
        states.append(e.RankState(rank=rank, host="node2", memory=(device, cpu), waited_seconds=waits))
    last = replace(states[-1].memory[0], peak_bytes=20 << 30)
    states[-1] = replace(states[-1], memory=(last, states[-1].memory[1]))
    return e.RanksReported(block="model.layers.3", ranks=tuple(states))


def test_all_ranks_are_told_of_and_of_many_the_slowest_and_the_fullest() -> None:
    (line,) = lines(ranks_reported())
    assert line.startswith(
        "ranks after model.layers.3: rank 1 on node2 the slowest, the others waited up to 2.5 s; "
        "rank 0 on node2: cuda:0 allocated 1.25"
    )
    assert "; rank 1 on node2: cuda:0 allocated" in line
    (line,) = lines(ranks_reported(64))
    assert "rank 1 on node2 the slowest" in line
    assert "; fullest rank 63 on node2, cuda:0 " in line
    assert "rank 2 on" not in line


def test_a_long_wait_for_others_is_told_and_a_short_one_is_not() -> None:
    waited = e.RanksWaited(seconds=35.0, ranks=("rank 1 on node2",))
    assert lines(waited) == ("ranks: waiting for rank 1 on node2, 35.0 s",)
    assert lines(replace(waited, over=True)) == ("ranks: waited for rank 1 on node2, 35.0 s",)
    assert lines(replace(waited, ranks=())) == ("ranks: waiting for data on its way, 35.0 s",)
    assert lines(replace(waited, seconds=2.0)) == ()
