"""When a snapshot is due: seldom enough to cost little, often enough to be worth it."""

from __future__ import annotations

import pytest

from gptq_cli.jobs import snapshot_time
from gptq_cli.jobs.snapshot_time import REDONE_SHARE, SNAPSHOT_SHARE, Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which tests set."""
    times = [0.0]
    monkeypatch.setattr(snapshot_time.time, "perf_counter", lambda: times[0])
    return times


@pytest.mark.parametrize("block_seconds", [3.0, 30.0, 300.0])
@pytest.mark.parametrize("cost", [0.1, 2.0, 20.0])
def test_a_long_run(block_seconds: float, cost: float, now: list[float]) -> None:
    """The share of the time is kept; where it allows that, what a kill makes a run do again is bounded."""
    clock, size = Clock(0.0, last_snapshot=0.0, bytes_per_second=1e9), int(cost * 1e9)
    for _ in range(64):
        now[0] += block_seconds
        if clock.snapshot_due(size, 0.0):
            now[0] += cost
            clock.snapshot_seconds += cost
            clock.last_snapshot = now[0]
        assert clock.snapshot_seconds <= SNAPSHOT_SHARE * now[0]
    if cost <= SNAPSHOT_SHARE * block_seconds:  # there is always time for one
        assert clock.snapshot_seconds > 0
        assert now[0] - clock.last_snapshot <= max(block_seconds, REDONE_SHARE * now[0]) + block_seconds


def test_the_time_of_earlier_starts_counts(now: list[float]) -> None:
    clock = Clock(0.0, last_snapshot=0.0, bytes_per_second=1e9)
    now[0] = 100.0
    assert clock.snapshot_due(10**9, 0.0)
    assert clock.snapshot_due(10**9, 3800.0)
    assert not clock.snapshot_due(10**9, 4000.0)


def test_the_first_one_is_taken_to_be_slow(now: list[float]) -> None:
    clock = Clock(0.0, last_snapshot=0.0)
    now[0] = 1.0
    assert not clock.snapshot_due(1, 0.0)
    now[0] = 3.0
    assert clock.snapshot_due(1, 0.0)
    assert not clock.snapshot_due(10**9, 0.0)
