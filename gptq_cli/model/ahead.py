"""Reading one thing ahead, in another thread, while this one works.

The thread lives as long as what it reads: there is none left when what was asked for has been taken, or after
`cancel`, which waits for it; it looks between two pieces of work whether to go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Cancelled(Exception):  # noqa: N818 - a signal, not an error
    """Raised in the thread by `proceed`."""


class ReadAhead(Generic[T]):
    """Calls `read(proceed)` in a thread, which calls `proceed` between two pieces of work."""

    def __init__(self, name: str, read: Callable[[Callable[[], None]], T]) -> None:
        self.name = name
        """What is read."""
        self._read = read
        self._cancelled = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"gptq-read {name}", daemon=True)
        self._thread.start()

    def take(self) -> T:
        """Wait for what was read; raises what was raised in the thread."""
        self._thread.join()
        error, self._error = self._error, None
        result, self._result = self._result, None
        if error is not None:
            raise error
        assert result is not None
        return result

    def cancel(self) -> None:
        """End the thread, and drop what it has read."""
        self._cancelled.set()
        self._thread.join()
        self._error = self._result = None

    def _run(self) -> None:
        try:
            self._result = self._read(self._proceed)
        except _Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - raised by `take`
            self._error = error

    def _proceed(self) -> None:
        if self._cancelled.is_set():
            raise _Cancelled
