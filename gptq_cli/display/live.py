"""The last lines of a terminal, drawn again and again; what is printed goes above them.

A terminal that becomes narrower breaks the lines that are on it already into several, so that moving up by
the lines of the last picture would leave pieces of it behind. Here the picture is taken away by what it has
become: each of its lines stands with its length, and a line of 80 characters takes two rows of 50. A few old
terminals cut lines instead; `breaks_lines` tells.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from rich.console import Console, RenderableType
from rich.control import Control
from rich.segment import ControlCode, ControlType, Segment, Segments


def breaks_lines(environ: Mapping[str, str]) -> bool:
    """Whether the terminal breaks lines that have become too long, as nearly all do, or cuts them."""
    cuts = {"XTERM_VERSION", "STY"} & environ.keys()
    return not cuts and environ.get("TERM") != "linux"


class Live:
    """Draws what `picture` gives, some times a second, in a thread of its own. Nothing at all off a
    terminal."""

    def __init__(
        self,
        console: Console,
        picture: Callable[[], RenderableType],
        *,
        per_second: float,
        broken: bool = True,
    ) -> None:
        """`broken`: the terminal breaks lines that have become too long."""
        self._console = console
        self._picture = picture
        self._seconds = 1 / per_second
        self._broken = broken
        self._lengths: tuple[int, ...] = ()
        """Of the lines that stand there, in characters."""
        self._lock = threading.RLock()
        self._stopped: threading.Event | None = None

    @property
    def is_started(self) -> bool:
        """Whether it draws."""
        return self._stopped is not None

    def start(self) -> None:
        """Begin to draw, with the cursor hidden."""
        with self._lock:
            if self.is_started or not self._console.is_terminal:
                return
            self._stopped = threading.Event()
            self._console.show_cursor(False)
            self.refresh()
            threading.Thread(target=self._run, args=(self._stopped,), daemon=True).start()

    def stop(self) -> None:
        """Take the picture away and show the cursor."""
        with self._lock:
            if self._stopped is not None:
                self._stopped.set()
                self._stopped = None
                with self._console:
                    self._erase()
                    self._console.show_cursor(True)

    def refresh(self) -> None:
        """Draw the picture as it is now."""
        self.print()

    def print(self, *lines: RenderableType) -> None:
        """Print `lines`, which stay, above the picture."""
        with self._lock, self._console:  # the console writes once, at the end
            self._erase()
            for line in lines:
                self._console.print(line, markup=False, highlight=False)
            if self.is_started:
                self._draw()

    def _run(self, stopped: threading.Event) -> None:
        while not stopped.wait(self._seconds):
            with self._lock:
                if not stopped.is_set():
                    self.refresh()

    def _draw(self) -> None:
        drawn = self._console.render_lines(self._picture(), pad=False)[: self._console.height]
        lines = [_without_blanks_at_the_end(line) for line in drawn]
        self._lengths = tuple(Segment.get_line_length(line) for line in lines)
        broken = [[*line, Segment.line()] for line in lines[:-1]] + lines[-1:]
        self._console.print(Segments(segment for line in broken for segment in line), end="")

    def _erase(self) -> None:
        """Take away what stands there, and leave the cursor where it began."""
        if not self._lengths:
            return
        width = max(self._console.width, 1)
        rows = [max(1, -(-length // width)) if self._broken else 1 for length in self._lengths]
        up = min(sum(rows), self._console.height) - 1
        codes: list[ControlType | ControlCode] = [ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)]
        codes += [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)] * up
        self._console.control(Control(*codes))
        self._lengths = ()


def _without_blanks_at_the_end(line: list[Segment]) -> list[Segment]:
    """A line without the blanks that only fill it, which a narrower terminal would break as well."""
    kept = list(line)
    while kept and not kept[-1].text.rstrip(" "):
        kept.pop()
    if kept:
        last = kept.pop()
        kept.append(Segment(last.text.rstrip(" "), last.style, last.control))
    return kept
