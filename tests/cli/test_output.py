"""The two streams."""

from __future__ import annotations

import io
from typing import cast

from gptq_cli.cli.output import LineSink, Unbreakable, without_findings
from gptq_cli.events import Event, FindingRaised, Warned
from tests.display.events import OFFLOAD


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


def test_findings_are_kept_from_the_display_where_the_result_holds_them() -> None:
    events: list[Event] = []
    observer = without_findings(events.append)
    warned = Warned("w")
    observer(FindingRaised(OFFLOAD))
    observer(warned)
    assert events == [cast(Event, warned)]
