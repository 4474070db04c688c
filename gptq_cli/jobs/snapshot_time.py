"""When a snapshot of the hidden states is due, and the seconds of a start that decide on it.

A snapshot is written when that is worth it and costs little:

    all snapshots together take at most `SNAPSHOT_SHARE` of the time, as measured
    since the last one more than `REDONE_SHARE` of all the time spent so far went by
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SNAPSHOT_SHARE = 0.02
REDONE_SHARE = 0.025
ASSUMED_BYTES_PER_SECOND, ASSUMED_SECONDS = 200e6, 0.05
"""Of a disk on which no snapshot was written yet: its speed, and what the smallest file takes."""


@dataclass(slots=True)
class Clock:
    """Seconds of this start, and what they went into."""

    started: float
    """Of `time.perf_counter`."""
    journal_seconds: float = 0.0
    snapshot_seconds: float = 0.0
    last_snapshot: float = field(default_factory=time.perf_counter)
    bytes_per_second: float = ASSUMED_BYTES_PER_SECOND

    @property
    def seconds(self) -> float:
        """Since the beginning of the run."""
        return time.perf_counter() - self.started

    def snapshot_due(self, size_bytes: int, earlier_seconds: float) -> bool:
        """Whether one of `size_bytes` should be written now; `earlier_seconds`: of the starts before."""
        expected = max(ASSUMED_SECONDS, size_bytes / self.bytes_per_second)
        cost = self.snapshot_seconds + expected
        since = time.perf_counter() - self.last_snapshot
        spent = self.seconds
        return cost <= SNAPSHOT_SHARE * spent and since >= REDONE_SHARE * (earlier_seconds + spent)

    @contextmanager
    def added(self, name: str) -> Iterator[None]:
        """Add the seconds until the end of the `with` to the field `name`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - begun)
