from __future__ import annotations

import signal
import sys
from types import FrameType

import pytest
import torch

from gptq_cli.engine.pausing_forward import PausingForward


class Endless(PausingForward):
    """A forward that pauses again and again."""

    def __init__(self) -> None:
        super().__init__("endless")
        self.turns = 0

    def forward(self) -> None:
        while True:
            self.turns += 1
            self.pause()


def test_it_runs_when_told_to_and_ends_where_it_waits() -> None:
    forward = Endless()
    for turn in range(1, 4):
        forward.resume()
        assert forward.turns == turn
    forward.cancel()
    assert not forward.is_alive()
    Endless().cancel()  # one that never ran


def test_what_waits_keeps_no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on an H200: 32 MiB for each forward that waits."""
    cleared: list[int] = []
    forward = Endless()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(forward.turns), raising=False
    )
    forward.resume()
    forward.resume()
    forward.cancel()
    assert cleared == [1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no timer that sends a signal")
def test_one_whose_engine_was_interrupted_anywhere_can_be_ended() -> None:
    """With semaphores, one in seven hung here."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(80):
            forward = Endless()
            forward.resume()
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + number * 0.00003)
                while True:
                    forward.resume()
            forward._cancelled = True
            forward._go.put(None)
            forward.join(20)
            assert not forward.is_alive(), number
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
