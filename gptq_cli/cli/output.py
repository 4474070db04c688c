"""stdout is the result, stderr is the talk.

`watch` lends an observer that draws on stderr for as long as a job runs; `show` writes the result to stdout.
While a job runs, whatever libraries print goes to stderr, and with `--progress jsonl` into a `Log` event,
so that both streams hold what they promise. A reader of stderr that goes away does not end the work.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO, cast

from gptq_cli.devices.host_memory import steady_heap
from gptq_cli.devices.host_threads import steady_threads
from gptq_cli.display.choose import Progress, choose
from gptq_cli.display.jsonl import JsonlDisplay
from gptq_cli.events import Event, FindingRaised, Observer, RunFinished, TextGenerated, warning_text
from gptq_cli.findings import Finding
from gptq_cli.results import document

if TYPE_CHECKING:
    from rich.console import RenderableType

QUIET_LIBRARIES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Bars and advice of libraries would tear the display apart; set in the environment, these win."""


@dataclass(slots=True)
class Session:
    """What `main` must know about the command that it runs, should it fail."""

    argv: tuple[str, ...] = ()
    as_json: bool = False
    seen: list[Finding] = field(default_factory=list)
    """Findings that a display has shown."""
    quiet: bool = False
    """Errors alone reach stderr."""
    done: bool = False
    """The result is in place: what comes after it is no interruption of the work."""
    documented: bool = False
    """The one JSON document is on stdout already: an error that follows from it is not another."""


class LineSink(io.TextIOBase):
    """A stream that hands every line, without its end, to `take`."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._open_line = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._open_line = (self._open_line + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.strip():
                self._take(line)
        return len(text)


class Unbreakable(io.TextIOBase):
    """`stream`, but a reader that went away is no error: what is written from then on is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only here, a plain attribute there
        return self._stream.encoding

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if not self._broken:
            try:
                self._stream.write(text)
            except (OSError, ValueError):
                self._broken = True
        return len(text)

    def flush(self) -> None:
        if not self._broken:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._broken = True


class Voice:
    """Text that is generated while a job runs: on stdout at once, and apart from all that follows it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    @property
    def at_terminal(self) -> bool:
        """Whether what is said is seen on a terminal, where a display may be as well."""
        return self._stream.isatty()

    def say(self, text: str) -> None:
        """Write a piece of text."""
        self._stream.write(text)
        self._stream.flush()
        self._last = text[-1:] or self._last

    def rest(self) -> None:
        """End the text, if there was any, with an empty line."""
        if self._last:
            self._stream.write("\n" if self._last == "\n" else "\n\n")
            self._stream.flush()
            self._last = ""


@contextmanager
def watch(
    session: Session, progress: Progress, *, quiet: bool, findings_in_result: bool = False
) -> Iterator[Observer]:
    """Lend an observer that draws on stderr; everything that libraries print meanwhile goes there, too.

    Generated text goes to stdout as it comes, unless the result is a JSON document, which holds it. With
    `findings_in_result` notes and errors are left to the result, and so are warnings where a person sees both
    streams on one terminal.
    """
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    steady_heap()
    steady_threads(os.environ)
    session.quiet = quiet
    talk = sys.stderr
    silent = quiet or talk is None
    stream = cast(TextIO, Unbreakable(talk)) if talk is not None else io.StringIO()
    voice = Voice(sys.stdout) if sys.stdout is not None and not session.as_json else None
    shared = voice is not None and voice.at_terminal
    together = shared and talk is not None and talk.isatty()
    with ExitStack() as stack:
        if voice is not None:
            stack.callback(voice.rest)
        display = choose(progress, quiet=silent, stream=stream, environ=os.environ, beside_text=shared)
        observer = stack.enter_context(display)
        if isinstance(display, JsonlDisplay):
            stack.enter_context(redirect_stderr(cast(TextIO, LineSink(display.log))))
        elif quiet:
            stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(redirect_stdout(sys.stderr))

        def tell(event: Event) -> None:
            if isinstance(event, FindingRaised):
                warns = warning_text(event) is not None
                if findings_in_result and (together or not warns):
                    return
                if not silent and (warns or progress != "none"):
                    session.seen.append(event.finding)
            if isinstance(event, RunFinished):
                session.done = True
            if voice is not None and not isinstance(event, TextGenerated):
                voice.rest()
            observer(event)
            if voice is not None and isinstance(event, TextGenerated):
                voice.say(event.text)

        yield tell


def show(session: Session, report: object, table: Callable[[], RenderableType]) -> None:
    """Write the result to stdout: the JSON document of `report`, or the table of it."""
    if session.as_json:
        write_document(document(report))
        session.documented = True
        return
    if sys.stdout is None:  # closed by the caller: nobody wants the result
        return
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    if console.is_terminal:
        console.print(table(), markup=False)
    else:  # a file: no colour, and no blanks at the ends of lines
        with console.capture() as text:
            console.print(table(), markup=False)
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in text.get().splitlines())
    sys.stdout.flush()


def write_document(body: object) -> None:
    """One JSON document, one line, ASCII, so that it survives every encoding of stdout."""
    if sys.stdout is None:  # closed by the caller: nobody wants the result
        return
    sys.stdout.write(json.dumps(body, allow_nan=False) + "\n")
    sys.stdout.flush()
