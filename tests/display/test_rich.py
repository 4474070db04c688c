"""The live display, on a recorded terminal: it fits, it says everything, and it leaves the cursor alone."""

import io
import re
from typing import get_args

import pytest
from rich.console import Console

from gptq_cli import events as e
from gptq_cli.display.plain import lines as plain_lines
from gptq_cli.display.rich import RichDisplay
from gptq_cli.results.run import BlockReport
from tests.display.events import DENSE, OFFLOAD, linear, memory, sample_run
from tests.display.test_plain import Clock, ranks_reported
from tests.golden import check_golden

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A pretended terminal of `width` columns and the display on it."""

    def __init__(self, width: int, height: int = 50, *, beside_text: bool = False) -> None:
        self.clock = Clock()
        self.stream = io.StringIO()
        console = Console(
            file=self.stream,
            width=width,
            height=height,
            force_terminal=True,
            color_system="truecolor",
            legacy_windows=False,
            highlight=False,
            _environ={},
        )
        self.display = RichDisplay(console, self.clock, beside_text=beside_text)
        self.width, self.height = width, height

    def play(self, until: type[e.Event] | None = None, nth: int = 1, blocks: int = 3) -> None:
        """Feed the sample_run up to the `nth` event of type `until`."""
        for self.clock.now, event in sample_run(blocks):
            self.display(event)
            if until and isinstance(event, until):
                nth -= 1
                if nth == 0:
                    return

    def picture(self) -> str:
        """What moves, as text."""
        still = Console(
            file=io.StringIO(), width=self.width, height=self.height, color_system=None, _environ={}
        )
        still.print(self.display._picture())
        assert isinstance(still.file, io.StringIO)
        return still.file.getvalue()

    @property
    def settled(self) -> str:
        """All that was written, without escape codes."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.stream.getvalue())


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize(
    ("until", "nth"),
    [(e.PhaseAdvanced, 2), (e.SamplesAdvanced, 1), (e.LinearQuantized, 15), (e.BlockFinished, 2)],
)
def test_the_picture_at_every_moment_fits(width: int, until: type[e.Event], nth: int) -> None:
    terminal = Terminal(width)
    terminal.play(until, nth)
    name = f"picture_{width}_{until.__name__}.txt"
    text = "\n".join(line.rstrip() for line in terminal.picture().splitlines()) + "\n"
    assert max(map(len, text.splitlines())) <= width
    check_golden(f"rich/{name}", text)


@pytest.mark.parametrize("width", [80, 160])
def test_what_is_settled_fits_and_says_everything(width: int) -> None:
    terminal = Terminal(width)
    terminal.play()  # not entered: nothing moves, only settled lines are written
    text = terminal.settled
    assert max(map(len, text.splitlines())) <= width
    for index in range(3):
        assert f"model.layers.{index} " in text
    check_golden(f"rich/settled_{width}.txt", "\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def test_the_cursor_comes_back_after_an_exception() -> None:
    terminal = Terminal(80)

    def run() -> None:
        with terminal.display:
            terminal.play(e.LinearQuantized, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    raw = terminal.stream.getvalue()
    assert raw.count(HIDE) == raw.count(SHOW) == 1
    assert raw.rindex(SHOW) > raw.rindex(HIDE)
    assert terminal.settled.rstrip().endswith("stopped in block 2/3, model.layers.1, 3 of 7 linears done")


def test_nothing_moves_after_the_end() -> None:
    terminal = Terminal(80)
    with terminal.display:
        terminal.play()
    assert "last linears" not in terminal.settled.splitlines()[-1]
    assert terminal.stream.getvalue().count(SHOW) == 1


def test_a_low_terminal_gets_fewer_linears() -> None:
    terminal = Terminal(80, height=15)
    terminal.play(e.LinearQuantized, 12)
    lines = terminal.picture().splitlines()
    assert len(lines) < 15
    assert sum("gptq" in line for line in lines) >= 1


@pytest.mark.parametrize("width", [40, 55])
def test_a_narrow_terminal_loses_columns_and_cuts_no_figure(width: int) -> None:
    terminal = Terminal(width)
    terminal.play(e.BlockFinished, 2)
    text = "\n".join(line.rstrip() for line in terminal.picture().splitlines()) + "\n"
    assert max(map(len, text.splitlines())) <= width
    check_golden(f"rich/picture_{width}.txt", text)
    settled = [line.rstrip() for line in terminal.settled.splitlines()]
    assert max(map(len, settled)) <= width
    check_golden(f"rich/settled_{width}.txt", "\n".join(settled) + "\n")


@pytest.mark.parametrize("width", range(20, 131, 5))
def test_no_line_wraps_at_any_width(width: int) -> None:
    terminal = Terminal(width)
    terminal.play(e.LinearQuantized, 15)
    assert max(map(len, terminal.picture().splitlines())) <= width
    assert "…" not in "".join(line for line in terminal.picture().splitlines() if "GiB" in line)


def test_names_as_long_as_they_come_do_not_wrap() -> None:
    terminal = Terminal(80)
    block = "model.language_model.very_long_prefix.transformer.decoder.layers.117"
    start = e.BlockStarted(name=block, index=117, total=118, device="cuda:0", stages=(("mlp.up_proj",),))
    terminal.display(start)
    report = linear(block, "mlp.up_proj", 0)
    terminal.display(e.LinearQuantized(block, report))
    lines = terminal.picture().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("layers.117" in line or "117.mlp.up_proj" in line for line in lines)


def test_findings_in_a_row_are_one_table() -> None:
    terminal = Terminal(80)
    terminal.display(e.FindingRaised(DENSE))
    terminal.display(e.FindingRaised(OFFLOAD))
    assert terminal.settled == ""
    terminal.display(e.PhaseStarted("load"))
    assert terminal.settled.index("cpu-offload") < terminal.settled.index("left-dense")


def test_findings_are_not_lost_when_the_run_is_refused() -> None:
    terminal = Terminal(80)
    with terminal.display:
        terminal.display(e.FindingRaised(OFFLOAD))
    assert "CPU offload is not recommended" in terminal.settled


def test_markup_in_a_message_is_text() -> None:
    terminal = Terminal(80)
    terminal.display(e.Warned("[red]left[/red] as [it] is", hint="[x]"))
    assert "[red]left[/red] as [it] is" in terminal.settled


def test_memory_that_is_nearly_full_is_said_in_words() -> None:
    terminal = Terminal(80)
    full = e.DeviceMemory(
        device="cuda:0",
        allocated_bytes=90 * 2**30,
        reserved_bytes=95 * 2**30,
        peak_bytes=99 * 2**30,
        total_bytes=100 * 2**30,
    )
    terminal.display(e.CacheFlushed(where="capture", subject="", before=memory(0)[:1], after=(full,)))
    assert "█ 90.0  ▓ 95.0  peak 99.0 of 100 GiB  NEARLY FULL\n" in terminal.picture()


def test_before_the_first_event_it_says_that_it_is_starting() -> None:
    terminal = Terminal(80)
    terminal.clock.now = 3.0
    words = terminal.picture().split()
    assert (words[0], words[-1]) == ("startup", "0:00:03")
    terminal.play(e.PhaseFinished, nth=1)
    assert "done      load" in terminal.settled


@pytest.mark.parametrize("beside_text", [True, False])
def test_the_picture_makes_way_for_text_on_the_same_terminal(beside_text: bool) -> None:
    """As on a real one, the text is written to the terminal itself, while nothing else may be."""
    terminal = Terminal(80, beside_text=beside_text)
    with terminal.display:
        terminal.display(e.PhaseStarted("generate", 4))
        terminal.display(e.TextGenerated("Once", 1))
        assert terminal.display._live.is_started is not beside_text
        terminal.stream.write("Once")
        terminal.display(e.TextGenerated(" upon", 2))
        before = terminal.stream.getvalue()
        terminal.stream.write(" upon\n")
        terminal.display(e.PhaseFinished("generate", 1.0, "2 tokens"))
        assert terminal.display._live.is_started
        if beside_text:
            assert before.endswith("Once")
    raw = terminal.stream.getvalue()
    assert raw.count(HIDE) == raw.count(SHOW) == (2 if beside_text else 1)
    assert terminal.settled.index("upon") < terminal.settled.index("done      generate")


def test_tokens_are_counted_where_no_text_is_shown() -> None:
    terminal = Terminal(80)
    terminal.display(e.PhaseStarted("generate", 64))
    terminal.display(e.TextGenerated("Once upon", 3))
    assert "3/64" in terminal.picture()


def test_an_error_while_text_is_written_leaves_the_cursor_alone() -> None:
    terminal = Terminal(80, beside_text=True)

    def run() -> None:
        with terminal.display:
            terminal.display(e.TextGenerated("Once", 1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert terminal.stream.getvalue().count(HIDE) == terminal.stream.getvalue().count(SHOW) == 1


@pytest.mark.parametrize("phase", get_args(e.Phase))
def test_a_phase_has_one_name_everywhere(phase: e.Phase) -> None:
    terminal = Terminal(80)
    terminal.display(e.PhaseStarted(phase))
    moving = terminal.picture().split()[0]
    terminal.display(e.PhaseFinished(phase, 1.0))
    (plain,) = plain_lines(e.PhaseFinished(phase, 1.0))
    assert (moving, terminal.settled.split()[1], plain.split(":")[0]) == (phase, phase, phase)


def test_before_the_first_block_is_done_the_estimate_says_how_much_time_is_left() -> None:
    terminal = Terminal(80)
    started = e.RunStarted(
        command="quantize",
        model="m",
        out="o",
        settings=(),
        devices=("cpu",),
        blocks=2,
        linears=2,
        seconds=90.0,
    )
    terminal.display(started)
    terminal.clock.now = 20.0
    stages = (("mlp.up_proj",),)
    terminal.display(e.BlockStarted(name="b", index=0, total=2, device="cpu", stages=stages))
    assert "0:00:20, 0:01:10 left" in terminal.picture()
    terminal.clock.now = 25.0
    report = BlockReport(name="b", seconds=5.0, peak_bytes=(), linears=())
    terminal.display(e.BlockFinished(index=0, total=2, report=report, memory=()))
    assert "0:00:25, 0:00:05 left" in terminal.picture()


def test_a_phase_says_how_much_time_is_left() -> None:
    terminal = Terminal(80)
    terminal.clock.now = 30.0
    terminal.display(e.PhaseAdvanced("evaluate", 16, 64, 90.0))
    terminal.clock.now = 40.0
    assert "16/64" in terminal.picture()
    assert "0:01:20 left" in terminal.picture()


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_devices_of_all_ranks_are_shown_the_slowest_and_who_is_waited_for(width: int) -> None:
    terminal = Terminal(width)
    terminal.play(e.BlockFinished)
    terminal.display(ranks_reported(3))
    text = terminal.picture()
    assert [line.split()[:2] for line in text.splitlines() if line.startswith(" rank ")] == [
        ["rank", "1"],
        ["rank", "2"],
    ]
    assert "slowest" in text
    if width >= 80:
        assert "rank 1 on node2 the slowest, the others waited 2.5 s" in text
    terminal.display(e.RanksWaited(seconds=35.0, ranks=("rank 2 on node2",)))
    assert "0:00:35 waiting for rank 2 on node2" in terminal.picture() or width < 60
    terminal.display(e.RanksWaited(seconds=36.0, ranks=("rank 2 on node2",), over=True))
    assert "waiting" not in terminal.picture()
    assert max(map(len, terminal.picture().splitlines())) <= width


def test_of_many_ranks_the_fullest_are_shown_and_the_picture_fits() -> None:
    terminal = Terminal(100, height=24)
    terminal.play(e.BlockFinished)
    terminal.display(ranks_reported(64))
    text = terminal.picture()
    assert len(text.splitlines()) <= 24
    assert " rank 63 " in text
    assert "64 ranks: rank 1 on node2 the slowest" in text
