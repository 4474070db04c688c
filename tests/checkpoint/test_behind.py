from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from gptq_cli.checkpoint import behind
from gptq_cli.checkpoint.behind import WriteBehind


@pytest.fixture
def writes() -> Iterator[WriteBehind]:
    made = WriteBehind()
    yield made
    made.close()


def test_everything_comes_back_in_order(writes: WriteBehind) -> None:
    done = [
        found
        for number in range(20)
        for found in writes.put(f"t{number}", behind.PENDING_BYTES // 4, lambda n=number: str(n))  # type: ignore[misc]
    ]
    assert len(done) == 16, "four are on their way at a time"
    done += writes.settled()
    assert done == [(f"t{number}", str(number)) for number in range(20)]
    assert list(writes.settled()) == []


def test_what_is_on_its_way_is_known(writes: WriteBehind) -> None:
    assert "a" not in writes
    assert list(writes.put("a", 2 * behind.PENDING_BYTES, lambda: "x")) == []
    assert "a" in writes
    assert list(writes.put("b", 1, lambda: "y")) == [("a", "x")], "one that is larger than the limit is alone"
    assert "a" not in writes


def test_an_error_comes_where_it_is_waited_for(writes: WriteBehind) -> None:
    def full() -> str:
        raise OSError(28, "no space left on device")

    assert list(writes.put("a", 1, full)) == []
    with pytest.raises(OSError, match="no space"):
        list(writes.settled())


def test_closing_waits_for_what_has_begun_and_drops_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "MAX_THREADS", 1)
    writes = WriteBehind()
    begun, go_on, written = threading.Event(), threading.Event(), []

    def slow() -> str:
        begun.set()
        go_on.wait(20)
        written.append("slow")
        return ""

    def never() -> str:
        written.append("never")
        return ""

    assert [*writes.put("slow", 1, slow), *writes.put("never", 1, never)] == []
    assert begun.wait(20)
    dropped = writes._pending[-1]
    closing = threading.Thread(target=writes.close)
    closing.start()
    while dropped.write is not None and closing.is_alive():
        closing.join(0.005)
    go_on.set()
    closing.join(20)
    assert written == ["slow"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gptq-write")]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no timer that sends a signal")
def test_one_that_was_interrupted_anywhere_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With futures, one in fifty hung here."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)  # which may be held; SIGALRM never is

    monkeypatch.setattr(behind, "PENDING_BYTES", 1)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(300):
            writes = WriteBehind()
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.0004 + number * 0.00001)
                while True:
                    for _ in writes.put("a", 1, lambda: "x"):
                        pass
            closing = threading.Thread(target=writes.close, daemon=True)
            closing.start()
            closing.join(20)
            assert not closing.is_alive(), number
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_without_a_thread_it_does_the_work_itself(
    writes: WriteBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    began: list[str] = []
    assert list(writes.put("a", 1, lambda: began.append("a") or "digest")) == []  # type: ignore[func-returns-value]
    assert began == ["a"]
    assert list(writes.settled()) == [("a", "digest")]
