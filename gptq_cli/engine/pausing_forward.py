"""A forward in a thread of its own that stops where the engine must do something, and goes on when told to.

The engine's thread and this one never run at the same time: each waits until the other hands over. They do so
through queues, because a Ctrl-C in the middle of `threading.Semaphore` can leave its lock taken for ever.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from queue import SimpleQueue

from gptq_cli.devices.accelerators import free_workspaces
from gptq_cli.engine.capture import StopForward


class PausingForward(threading.Thread, ABC):
    """A forward that the engine lets run from pause to pause. It starts when first resumed."""

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._go: SimpleQueue[None] = SimpleQueue()
        self._yielded: SimpleQueue[None] = SimpleQueue()
        self._error: BaseException | None = None
        self._cancelled = False

    # -- the engine's side

    def resume(self) -> None:
        """Let it run to its next pause, or to its end. Raises what the forward raised."""
        if self.ident is None:
            self.start()
        self._go.put(None)
        self._yielded.get()
        free_workspaces()  # it waits, and may do so in good company
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the forward where it waits; its memory is free when this returns."""
        if self.ident is not None and self.is_alive():
            self._cancelled = True
            self._go.put(None)
            self.join()

    # -- the forward's side

    @abstractmethod
    def forward(self) -> None:
        """The work, which calls `pause` wherever the engine is to go on."""

    def pause(self) -> None:
        """Let the engine run until it resumes this. Raises `StopForward` if it is cancelled instead."""
        self._yielded.put(None)
        self._go.get()
        if self._cancelled:
            raise StopForward

    def run(self) -> None:
        """`forward`, once resumed; what it raises is carried to the engine's thread."""
        self._go.get()
        try:
            if not self._cancelled:
                self.forward()
        except StopForward:
            pass
        except BaseException as error:  # noqa: BLE001 - raised by `resume` in the engine's thread
            self._error = error
        self._yielded.put(None)
