"""How long a piece of work takes: the fastest of several tries, because what disturbs one makes it longer."""

from __future__ import annotations

import time
from collections.abc import Callable


def fastest(
    work: Callable[[], object],
    *,
    attempts: int,
    min_seconds: float = 0.0,
    settle: Callable[[], object] = lambda: None,
) -> float:
    """Seconds of the fastest of at least `attempts` calls, that go on until `min_seconds` have passed.

    `settle` waits for what a call only started (the queue of an accelerator), and counts as its part. The
    caller runs `work` once before, where a first call is slower.
    """
    best, begun, done = float("inf"), time.perf_counter(), 0
    while done < attempts or time.perf_counter() - begun < min_seconds:
        started = time.perf_counter()
        work()
        settle()
        best, done = min(best, time.perf_counter() - started), done + 1
    return best
