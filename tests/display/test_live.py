"""A picture is drawn again and again and leaves nothing behind, even on a terminal that changes its size."""

from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console
from rich.text import Text

from gptq_cli.display.live import Live, breaks_lines

CODES = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])")


class Screen(io.StringIO):
    """A terminal as far as a picture needs one. It breaks lines that have become too long, as most do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.rows: list[str] = [""]
        self.goes_on: list[bool] = [False]
        """Whether the next row belongs to the same line."""
        self.row = self.column = 0

    def write(self, text: str) -> int:
        at = 0
        while at < len(text):
            code = CODES.match(text, at)
            if code:
                self._obey(code[1], code[2])
                at = code.end()
            else:
                self._put(text[at])
                at += 1
        return len(text)

    def _obey(self, number: str, letter: str) -> None:
        if letter == "A":
            self.row = max(0, self.row - int(number or 1))
        elif letter == "K" and number == "2":
            self.rows[self.row], self.goes_on[self.row] = "", False

    def _put(self, letter: str) -> None:
        if letter == "\r":
            self.column = 0
        elif letter == "\n":
            self._down()
        else:
            if self.column == self.width:
                self.goes_on[self.row] = True
                self._down()
            line = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append("")
            self.goes_on.append(False)

    def resize(self, width: int) -> None:
        """Break every line anew; the cursor stays with its character."""
        self.width = width
        rows, goes_on, line = [], [], ""
        for index, (row, more) in enumerate(zip(self.rows, self.goes_on, strict=True)):
            if index == self.row:
                cursor = len(rows), len(line) + self.column
            line += row
            if not more:
                pieces = [line[at : at + width] for at in range(0, max(len(line), 1), width)]
                rows += pieces
                goes_on += [True] * (len(pieces) - 1) + [False]
                line = ""
        self.rows, self.goes_on = rows, goes_on
        self.row = cursor[0] + max(0, cursor[1] - 1) // width
        self.column = cursor[1] - (self.row - cursor[0]) * width

    @property
    def text(self) -> list[str]:
        """What is to be seen."""
        shown = [row.rstrip() for row in self.rows]
        while shown and not shown[-1]:
            shown.pop()
        return shown


def live_on(screen: Screen, lines: int = 3) -> tuple[Live, Console]:
    console = Console(
        file=screen, width=screen.width, height=30, force_terminal=True, legacy_windows=False, _environ={}
    )

    def picture() -> Text:
        return Text("\n".join(f"{index}".ljust(console.width, "=") for index in range(lines)))

    return Live(console, picture, per_second=0.001), console


def test_what_is_printed_stands_above_and_nothing_is_left_at_the_end() -> None:
    screen = Screen(20)
    live, _ = live_on(screen)
    live.start()
    live.print("first")
    live.refresh()
    live.print("second", "third")
    assert screen.text == ["first", "second", "third", *(f"{index}".ljust(20, "=") for index in range(3))]
    live.stop()
    assert screen.text == ["first", "second", "third"]


@pytest.mark.parametrize(("before", "after"), [(40, 15), (40, 39), (40, 20), (15, 40), (30, 7)])
def test_a_change_of_width_leaves_no_piece_of_the_picture(before: int, after: int) -> None:
    screen = Screen(before)
    live, console = live_on(screen)
    live.start()
    live.print("stays")
    screen.resize(after)
    console.width = after
    live.refresh()
    assert screen.text == ["stays", *(f"{index}".ljust(after, "=") for index in range(3))]
    screen.resize(before)
    console.width = before
    live.stop()
    assert screen.text == ["stays"]


def test_blanks_at_the_end_of_a_line_are_not_written() -> None:
    screen = Screen(40)
    console = Console(file=screen, width=40, force_terminal=True, legacy_windows=False, _environ={})
    live = Live(console, lambda: Text("a".ljust(40)), per_second=0.001)
    live.start()
    assert screen.rows[0] == "a"
    live.stop()


def test_nothing_moves_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    live = Live(Console(file=stream), lambda: "picture", per_second=0.001)
    live.start()
    live.print("line")
    live.stop()
    assert stream.getvalue() == "line\n"
    assert not live.is_started


def test_it_draws_by_itself() -> None:
    screen = Screen(20)
    _, console = live_on(screen)
    drawn = threading.Semaphore(0)

    def picture() -> str:
        drawn.release()
        return "picture"

    live = Live(console, picture, per_second=1000)
    live.start()
    assert all(drawn.acquire(timeout=60) for _ in range(3))
    live.stop()
    assert screen.text == []


@pytest.mark.parametrize(
    ("environ", "breaks"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "tmux-256color", "TMUX": "x"}, True),
        ({"TERM": "xterm", "XTERM_VERSION": "XTerm(379)"}, False),
        ({"TERM": "linux"}, False),
        ({"TERM": "screen", "STY": "1.x"}, False),
    ],
)
def test_old_terminals_cut_lines(environ: dict[str, str], breaks: bool) -> None:
    assert breaks_lines(environ) is breaks
