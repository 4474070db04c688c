"""Deferring signals: one that would end the run while a result is put in place is delivered afterwards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Defer SIGINT, SIGTERM and SIGHUP to the end of the block.

    Yields a function that raises `KeyboardInterrupt` if one is waiting: call it at the last moment at which
    the block may still be left. Signals go to the main thread, so in another thread nothing is deferred.
    """
    waiting: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    def check() -> None:
        if waiting:
            raise KeyboardInterrupt

    try:
        with ExitStack() as handlers:  # each is put back, whatever comes meanwhile; that of SIGINT last
            if threading.current_thread() is threading.main_thread():
                for name in _ENDING:
                    number = getattr(signal, name, None)
                    handler = signal.SIG_IGN if number is None else signal.getsignal(number)
                    if number is not None and handler not in (signal.SIG_IGN, None):
                        handlers.callback(signal.signal, number, handler)
                        signal.signal(number, keep)
            yield check
    finally:
        for number in dict.fromkeys(waiting):
            signal.raise_signal(number)
