"""Writing behind the work, in a few threads.

A packed tensor's digest takes as long as writing it, and a run waits for neither until a block is finished:
with several ranks, all of them would wait for the one that writes. What is on its way stays in memory, so
there is a limit to it.

The threads are handed work through queues, because a Ctrl-C in the middle of a `Future` or a `Semaphore` can
leave its lock taken for ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

from gptq_cli.checkpoint.held_signals import held_signals
from gptq_cli.devices.host_threads import usable_cores
from gptq_cli.placement.schedule import PENDING_BYTES

MAX_THREADS, CORES_A_THREAD = 4, 4


@dataclass(slots=True)
class _Piece:
    """A piece of work, and what came of it."""

    name: str
    size_bytes: int
    write: Callable[[], str] | None
    """None once it has begun, or is dropped: what it would write is in memory until then."""
    outcome: SimpleQueue[str | BaseException] = field(default_factory=SimpleQueue)

    def work(self) -> None:
        write, self.write = self.write, None
        if write is None:
            return
        try:
            self.outcome.put(write())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self.outcome.put(error)


class WriteBehind:
    """Pieces of work that are done in order or side by side; `digest`s come back with their names."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._asked: SimpleQueue[_Piece | None] = SimpleQueue()
        self._pending: deque[_Piece] = deque()
        self._pending_bytes = 0

    def __contains__(self, name: object) -> bool:
        """Whether `name` is on its way."""
        return any(name == piece.name for piece in self._pending)

    def put(self, name: str, size_bytes: int, write: Callable[[], str]) -> Iterator[tuple[str, str]]:
        """Have `write` called soon. Yields (name, what it returned) of those that are done, after waiting
        until there is room; raises what was raised."""
        while self._pending and self._pending_bytes + size_bytes > PENDING_BYTES:
            yield self._first()
        if not self._threads:
            self._start()
        piece = _Piece(name, size_bytes, write)
        self._pending.append(piece)
        self._pending_bytes += size_bytes
        if self._threads:
            self._asked.put(piece)
        else:
            piece.work()

    def settled(self) -> Iterator[tuple[str, str]]:
        """Wait for all; as `put`."""
        while self._pending:
            yield self._first()

    def close(self) -> None:
        """Drop what has not begun, and wait for what has: afterwards no file is written to."""
        for piece in self._pending:
            piece.write = None
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._pending.clear()
        self._pending_bytes = 0

    def _start(self) -> None:
        """Where the system has no thread left, fewer do: without any, `put` does the work itself."""
        with held_signals():  # a thread that is started waits for the one that starts it
            for _ in range(max(1, min(MAX_THREADS, usable_cores() // CORES_A_THREAD))):
                thread = threading.Thread(target=self._run, name="gptq-write", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # can't start new thread
                    return
                self._threads.append(thread)

    def _run(self) -> None:
        while (piece := self._asked.get()) is not None:
            piece.work()

    def _first(self) -> tuple[str, str]:
        piece = self._pending.popleft()
        self._pending_bytes -= piece.size_bytes
        outcome = piece.outcome.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return piece.name, outcome
