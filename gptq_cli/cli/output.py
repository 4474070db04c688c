"""stdout is the result; progress and messages go to stderr.

`watch` gives an observer that draws on stderr while a job runs; `show` writes the result to stdout.
While a job runs, whatever libraries print goes to stderr, and with `--progress jsonl` as a JSON line,
so that both streams hold what they promise. A stderr that cannot be written does not end the work; a stdout
that cannot be written does, with one line.

Everything that came from outside passes `display.escapes` here, on its way to a terminal or a log: events
and what libraries print in `watch`, the result in `show`, generated text in `StdoutText`.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO, TypeVar, cast

from gptq_cli.devices.host_memory import limit_malloc_arenas
from gptq_cli.devices.host_threads import cap_openmp_threads
from gptq_cli.display.choose import Progress, choose
from gptq_cli.display.escapes import console_for, escaped, json_line, many_lines
from gptq_cli.display.jsonl import JsonlDisplay
from gptq_cli.display.recorded import Recorder, recorders
from gptq_cli.errors import ConfigError, Interrupted
from gptq_cli.events import (
    Event,
    FindingRaised,
    Observer,
    RunFinished,
    TextGenerated,
    Warned,
    warning_text,
)
from gptq_cli.files import reason
from gptq_cli.findings import Finding
from gptq_cli.results.document import document

if TYPE_CHECKING:
    from rich.console import RenderableType

QUIET_LIBRARIES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Bars and advice of libraries would tear the display apart; set in the environment, these win."""


T = TypeVar("T")


class OutputLostError(Exception):
    """Standard output cannot be written: its disk is full, its reader went away. Caught by `main` alone."""


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
    """The result is in place: a signal after that does not interrupt the work."""
    interrupted: Interrupted | None = None
    """What an interrupted run says: what is kept of it, and how to go on."""
    warned: tuple[Warned, ...] = ()
    """What is said before the work begins, on every display."""
    log_file: str | None = None
    """Where a line per event goes, with the time of day."""
    events: str | None = None
    """Where a JSON line per event goes."""
    came: bool = False
    """This process has left word of itself where the ranks meet: the first is told what goes wrong here."""
    joined: bool = False
    """The ranks that a launcher started have met, and what is open between them would hold up their end."""
    json_lines: JsonlDisplay | None = None
    """What writes the JSON lines of `--progress jsonl`; None: stderr is for people."""
    documented: bool = False
    """The one JSON document is on stdout already; an error after that does not write another."""

    def come(self) -> None:
        """The first rank is told."""
        self.came = True

    def join(self) -> None:
        """The ranks have met."""
        self.joined = True


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

    def finish(self) -> None:
        """Hand out a last line without an end."""
        self.write("\n")


class Unbreakable(io.TextIOBase):
    """`stream`, but a failure to write is not an error: what follows is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: Exception | None = None
        """Why nothing is written any more."""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only here, a plain attribute there
        return self._stream.encoding

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def errors(self) -> str | None:  # type: ignore[override]  # as above
        return self._stream.errors

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def close(self) -> None:
        """Not ours to close: the interpreter, or whoever redirected it, needs the stream afterwards."""

    def _fail(self, error: Exception) -> None:
        """Remember the failure, and let what is buffered go nowhere: else it would fail again at exit."""
        self.failure = error
        with suppress(OSError, ValueError):
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


class Escaping(Unbreakable):
    """A stream for what libraries write: their lines stay, escape sequences become text."""

    def write(self, text: str) -> int:
        super().write(many_lines(text))
        return len(text)


class Output(Unbreakable):
    """Standard output: what cannot be written ends the command, once, with `OutputLostError`."""

    @property
    def reader_gone(self) -> bool:
        """Whether the reader went away, as `head` does when it has seen enough."""
        return isinstance(self.failure, OSError) and self.failure.errno == errno.EPIPE

    def _fail(self, error: Exception) -> None:
        super()._fail(error)
        raise OutputLostError(f"standard output cannot be written: {error}") from error


class StdoutText:
    """Text that is generated while a job runs: on stdout at once, and apart from all that follows it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    @property
    def at_terminal(self) -> bool:
        """Whether the text goes to a terminal, where a display may be as well."""
        return self._stream.isatty()

    def write(self, text: str) -> None:
        """Write a piece of text."""
        self._stream.write(many_lines(text) if self.at_terminal else text)
        self._stream.flush()
        self._last = text[-1:] or self._last

    def end(self) -> None:
        """End the text, if there was any, with an empty line."""
        if self._last:
            self._stream.write("\n" if self._last == "\n" else "\n\n")
            self._stream.flush()
            self._last = ""


@contextmanager
def watch(
    session: Session, progress: Progress, *, quiet: bool, findings_in_result: bool = False
) -> Iterator[Observer]:
    """Give an observer that draws on stderr; everything that libraries print meanwhile goes there, too.

    Generated text goes to stdout as it comes, unless the result is a JSON document, which holds it. With
    `findings_in_result` notes and errors are left to the result, and so are warnings where a person sees both
    streams on one terminal.
    """
    _require_working_directory()
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    limit_malloc_arenas()
    cap_openmp_threads(os.environ)
    session.quiet = quiet
    stderr = sys.stderr
    silent = quiet or stderr is None
    stream = cast(TextIO, Unbreakable(stderr)) if stderr is not None else io.StringIO()
    text = StdoutText(sys.stdout) if sys.stdout is not None and not session.as_json else None
    shared = text is not None and text.at_terminal
    together = shared and stderr is not None and stderr.isatty()
    with ExitStack() as stack:
        if text is not None:
            stack.callback(text.end)
        display = choose(progress, quiet=silent, stream=stream, environ=os.environ, beside_text=shared)
        observer = stack.enter_context(display)
        records = stack.enter_context(_recorded(session, observer))
        as_json = isinstance(display, JsonlDisplay)
        session.json_lines = display if isinstance(display, JsonlDisplay) else None
        log = getattr(display, "log", None)
        if log is None and not silent:
            escaping = Escaping(stderr)
            log = _line_writer(escaping) if records else None
        if log is not None or records:
            sink = LineSink(_all_of((*([log] if log is not None else []), *(one.log for one in records))))
            stack.callback(sink.finish)
            stack.enter_context(redirect_stderr(cast(TextIO, sink)))
        elif silent:
            stack.enter_context(redirect_stderr(io.StringIO()))
        else:
            stack.enter_context(redirect_stderr(cast(TextIO, Escaping(stderr))))
        stack.enter_context(redirect_stdout(sys.stderr))

        def observe(event: Event) -> None:
            if isinstance(event, FindingRaised):
                warns = warning_text(event) is not None
                if findings_in_result and (together or not warns):
                    return
                if not silent and (warns or progress != "none"):
                    session.seen.append(event.finding)
            if isinstance(event, RunFinished):
                session.done = True
            if text is not None and not isinstance(event, TextGenerated):
                text.end()
            plain = escaped(event)
            observer(event if as_json else plain)
            for record in records:
                record(event if record.as_json else plain)
            if text is not None and isinstance(event, TextGenerated):
                text.write(event.text)

        for warned in session.warned:
            observe(warned)
        yield observe


@contextmanager
def _recorded(session: Session, observer: Observer) -> Iterator[tuple[Recorder, ...]]:
    """The files of --log-file and --events: the error that ends the work is their last line."""
    records = recorders(session.log_file, session.events)
    try:
        yield records
    except BaseException as error:
        for record in records:
            record.failed(error)
        raise
    finally:
        for record in records:
            record.close()
            if record.failure is not None:
                observer(Warned(f"{record.path} is incomplete: {reason(record.failure)}"))


def _line_writer(stream: TextIO | Escaping) -> Callable[[str], None]:
    def write(line: str) -> None:
        stream.write(f"{line}\n")
        stream.flush()

    return write


def _all_of(takers: Sequence[Callable[[str], None]]) -> Callable[[str], None]:
    def take(line: str) -> None:
        for one in takers:
            one(line)

    return take


def _require_working_directory() -> None:
    """Raise where it was deleted: relative paths mean nothing then, and torch's libraries are not found."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory cannot be found: {reason(error)}", hint="cd to one that exists"
        ) from error


def show(session: Session, report: T, table: Callable[[T], RenderableType]) -> None:
    """Write the result to stdout: the JSON document of `report`, or the table of it.

    Raises `OutputLostError`, as everything that writes to stdout.
    """
    if session.as_json:
        write_document(document(report))
        session.documented = True
        return
    if sys.stdout is None:  # closed by the caller: the result is not wanted
        return
    console = console_for(sys.stdout)
    shown = table(escaped(report))
    if console.is_terminal:
        console.print(shown)
    else:  # a file: no colour, and no blanks at the ends of lines
        with console.capture() as text:
            console.print(shown)
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in text.get().splitlines())
    sys.stdout.flush()


def write_document(body: object) -> None:
    """One JSON document, one line, ASCII, so that it survives every encoding of stdout."""
    if sys.stdout is None:  # closed by the caller: the result is not wanted
        return
    sys.stdout.write(json_line(body) + "\n")
    sys.stdout.flush()
