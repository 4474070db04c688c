"""The same events in files, beside whatever display there is: `--log-file` and `--events`.

A log file holds the lines of the plain display, each with the time of day; an events file the JSON lines.
Both are appended to, so that a run that goes on does not lose what the first one wrote. Neither ends the
work: what keeps a file from being written is a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from gptq_cli.display.escapes import many_lines
from gptq_cli.display.jsonl import JsonlDisplay
from gptq_cli.display.plain import PlainDisplay
from gptq_cli.errors import ConfigError
from gptq_cli.events import Event
from gptq_cli.files import reason, shown


def time_of_day() -> str:
    """`2026-11-26 14:03:07`, local time."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")


class Recorder:
    """An observer that appends to a file; `log` takes lines of libraries, `failed` the error at the end."""

    def __init__(self, path: Path, name: str, *, as_json: bool) -> None:
        """`name`: the option that gave `path`. Raises `ConfigError` where it cannot be written."""
        self.path = path
        self.failure: OSError | None = None
        """What ended the writing."""
        try:
            self._file: TextIO = path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(
                f"{name} is {shown(path)!r}, which cannot be written: {reason(error)}",
                hint="give a file in a directory that you can write to",
            ) from error
        self.as_json = as_json
        self._display: JsonlDisplay | PlainDisplay = (
            JsonlDisplay(self._file) if as_json else PlainDisplay(self._file, stamp=time_of_day)
        )

    def __call__(self, event: Event) -> None:
        self._write(lambda: self._display(event))

    def log(self, text: str) -> None:
        """A line that a library wrote."""
        display, line = self._display, many_lines(text)
        self._write(lambda: display.log(text) if isinstance(display, JsonlDisplay) else display.record(line))

    def failed(self, error: BaseException) -> None:
        """The error that ends the work."""
        words = str(getattr(error, "message", "") or error or type(error).__name__)
        kind, display = type(error).__name__, self._display
        line = f"error: {many_lines(words)}"
        self._write(
            lambda: display.failed(kind, words) if isinstance(display, JsonlDisplay) else display.record(line)
        )

    def close(self) -> None:
        """Close the file."""
        self._write(self._file.close)
        with suppress(OSError):
            self._file.close()

    def _write(self, step: Callable[[], None]) -> None:
        if self.failure is None:
            try:
                step()
            except OSError as error:
                self.failure = error


def recorders(log_file: str | None, events: str | None) -> tuple[Recorder, ...]:
    """Those that were asked for. Raises `ConfigError`."""
    if log_file is not None and events is not None and Path(log_file).resolve() == Path(events).resolve():
        raise ConfigError(
            f"log_file and events are both {shown(events)!r}", hint="give each a file of its own"
        )
    found = []
    if log_file is not None:
        found.append(Recorder(Path(log_file).expanduser(), "log_file", as_json=False))
    if events is not None:
        found.append(Recorder(Path(events).expanduser(), "events", as_json=True))
    return tuple(found)
