"""One JSON object per event, for a program that reads along: `{"event": "BlockStarted", "index": 0, …}`.

The fields are those of the event's dataclass in `gptq_cli.events`; (name, value) pairs become objects.
Each has the time of day (`time`, UTC) and the seconds since the start. Every line is flushed, so that a
reader sees it at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import TextIO

from gptq_cli.display.escapes import json_line
from gptq_cli.events import Event
from gptq_cli.results.document import Json, to_json


def utc_now() -> str:
    """`2026-11-26T14:03:07.125+00:00`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class JsonlDisplay:
    """An observer that writes JSON lines to `stream`; a context manager like every display."""

    def __init__(
        self,
        stream: TextIO,
        get_time: Callable[[], float] = time.monotonic,
        get_now: Callable[[], str] = utc_now,
    ) -> None:
        self._stream = stream
        self._get_now = get_now
        self._get_time = get_time
        self._since = get_time()

    def __enter__(self) -> JsonlDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def __call__(self, event: Event) -> None:
        body = to_json(event)
        fields = body if isinstance(body, dict) else {}
        self._write(type(event).__name__, fields)

    def log(self, text: str) -> None:
        """A line that a library wrote to standard error, as `{"event": "Log", …}`: all output stays JSON."""
        self._write("Log", {"text": text})

    def failed(self, kind: str, message: str) -> None:
        """The error that ends the work, as `{"event": "Failed", "type": "ModelError", "message": …}`."""
        self._write("Failed", {"type": kind, "message": message})

    def _write(self, name: str, fields: dict[str, Json]) -> None:
        elapsed = round(self._get_time() - self._since, 3)
        line = json_line({"event": name, "time": self._get_now(), "elapsed_seconds": elapsed, **fields})
        self._stream.write(f"{line}\n")
        self._stream.flush()
