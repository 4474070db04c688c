from __future__ import annotations

import pytest

from gptq_cli import timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows its last number; work moves it."""
    times = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: times[-1])
    return times


def test_the_fastest_try_counts_with_what_it_only_started(clock: list[float]) -> None:
    took = iter([5.0, 2.0, 3.0])
    seconds = timing.fastest(
        lambda: clock.append(clock[-1] + next(took)),
        attempts=3,
        settle=lambda: clock.append(clock[-1] + 0.5),
    )
    assert seconds == 2.5
    assert next(took, None) is None


def test_it_goes_on_until_the_time_is_over(clock: list[float]) -> None:
    timing.fastest(lambda: clock.append(clock[-1] + 1), attempts=1, min_seconds=4)
    assert clock[-1] == 4
