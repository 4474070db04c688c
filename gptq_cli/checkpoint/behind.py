"""Writing behind the work, in a few threads.

A packed tensor's digest takes as long as writing it, and a run waits for neither until a block is finished:
with several ranks, all of them would wait for the one that writes. What is on its way stays in memory, so
there is a limit to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from gptq_cli.devices.host_threads import usable_cores

PENDING_BYTES = 128 << 20
"""On their way at a time, or one tensor."""
MAX_THREADS, CORES_A_THREAD = 4, 4


class WriteBehind:
    """Pieces of work that are done in order or side by side; `digest`s come back with their names."""

    def __init__(self) -> None:
        threads = max(1, min(MAX_THREADS, usable_cores() // CORES_A_THREAD))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="gptq-write")
        self._pending: deque[tuple[str, int, Future[str]]] = deque()
        self._pending_bytes = 0

    def __contains__(self, name: object) -> bool:
        """Whether `name` is on its way."""
        return any(name == pending for pending, _, _ in self._pending)

    def put(self, name: str, size_bytes: int, write: Callable[[], str]) -> Iterator[tuple[str, str]]:
        """Have `write` called soon. Yields (name, what it returned) of those that are done, after waiting
        until there is room; raises what was raised."""
        while self._pending and self._pending_bytes + size_bytes > PENDING_BYTES:
            yield self._first()
        self._pending.append((name, size_bytes, self._threads.submit(write)))
        self._pending_bytes += size_bytes

    def settled(self) -> Iterator[tuple[str, str]]:
        """Wait for all; as `put`."""
        while self._pending:
            yield self._first()

    def close(self) -> None:
        """Drop what has not begun, and wait for what has: afterwards no file is written to."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._pending_bytes = 0

    def _first(self) -> tuple[str, str]:
        name, size_bytes, future = self._pending.popleft()
        self._pending_bytes -= size_bytes
        return name, future.result()
