"""The two streams."""

from __future__ import annotations

import errno
import io
import re
from contextlib import redirect_stderr, redirect_stdout
from typing import TextIO, cast

import pytest

from gptq_cli.cli.output import (
    Escaping,
    LineSink,
    Output,
    OutputLostError,
    Session,
    StdoutText,
    Unbreakable,
    watch,
)
from gptq_cli.display.choose import Progress
from gptq_cli.events import FindingRaised, Warned
from gptq_cli.findings import Finding
from tests.display.events import DENSE, OFFLOAD, REFUSED


class Broken(io.StringIO):
    """A stream whose reader goes away after the first write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes > 1:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_broken_stream_is_given_up_quietly() -> None:
    broken = Broken()
    stream = Unbreakable(broken)
    assert stream.write("a") == 1
    assert stream.write("bcd") == 3
    assert stream.write("e") == 1
    stream.flush()
    assert (broken.getvalue(), broken.writes) == ("a", 2)


def test_a_closed_stream_is_given_up_quietly() -> None:
    inner = io.StringIO()
    stream = Unbreakable(inner)
    inner.close()
    assert stream.write("x") == 1


def test_lines_arrive_whole() -> None:
    lines: list[str] = []
    sink = LineSink(lines.append)
    for piece in ("a", "b\n\n", "10%\r20%\r", "c\nd"):
        sink.write(piece)
    assert lines == ["ab", "10%", "20%", "c"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(progress: Progress, out: io.StringIO, err: io.StringIO, **how: bool) -> tuple[str, list[Finding]]:
    """What stderr shows of a note, a warning and an error finding and of the engine's warning."""
    session = Session()
    with redirect_stdout(out), redirect_stderr(err), watch(session, progress, **how) as observer:
        for finding in (DENSE, OFFLOAD, REFUSED):
            observer(FindingRaised(finding))
        observer(Warned("w"))
    return err.getvalue(), session.seen


@pytest.mark.parametrize("progress", ["auto", "plain", "rich", "jsonl", "none"])
@pytest.mark.parametrize("in_result", [True, False])
def test_warnings_reach_stderr_on_every_display(progress: Progress, in_result: bool) -> None:
    text, seen = told(progress, io.StringIO(), io.StringIO(), quiet=False, findings_in_result=in_result)
    assert "CPU offload is not recommended" in " ".join(text.split())
    assert OFFLOAD in seen
    assert re.search(r"warning +w|warning: w|\"message\": \"w\"", text)
    assert ("left-dense" in text) == (not in_result and progress != "none")
    assert ("disk-offload" in text) == (REFUSED in seen) == (not in_result and progress != "none")


def test_quiet_shows_none() -> None:
    for progress in ("auto", "plain", "rich", "jsonl", "none"):
        assert told(cast(Progress, progress), io.StringIO(), io.StringIO(), quiet=True) == ("", [])


def test_a_terminal_that_shows_the_result_shows_its_findings_once() -> None:
    text, _ = told("plain", Terminal(), Terminal(), quiet=False, findings_in_result=True)
    assert "CPU offload" not in text
    assert "warning: w" in text
    text, _ = told("plain", io.StringIO(), Terminal(), quiet=False, findings_in_result=True)
    assert "CPU offload" in text


def test_a_last_line_without_an_end_is_handed_out() -> None:
    lines: list[str] = []
    sink = LineSink(lines.append)
    sink.write("a\nb")
    sink.finish()
    sink.finish()
    assert lines == ["a", "b"]


class Full(io.StringIO):
    """A stream on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_standard_output_that_is_lost_says_so_once() -> None:
    output = Output(Full())
    with pytest.raises(OutputLostError):
        output.write("a")
    assert output.write("b") == 1
    output.flush()
    assert not output.reader_gone
    gone = Output(Broken())
    gone.write("a")
    with pytest.raises(OutputLostError):
        gone.write("b")
    assert gone.reader_gone


def test_what_libraries_write_keeps_its_lines_alone() -> None:
    stream = io.StringIO()
    Escaping(stream).write("a\tb\n\x1b[31mred\x9b0m\n")
    assert stream.getvalue() == "a\tb\n\\x1b[31mred\\x9b0m\n"


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\tb\n\\x1b[2J\\r"), (False, "a\tb\n\x1b[2J\r")])
def test_generated_text_is_escaped_at_a_terminal_alone(terminal: bool, shown: str) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    text = StdoutText(cast(TextIO, stream))
    for piece in ("a\tb\n\x1b", "[2J\r"):
        text.write(piece)
    assert stream.getvalue() == shown
