"""Steps with the time that is left."""

from __future__ import annotations

import pytest

from gptq_cli.events import Event, PhaseAdvanced, counted


def test_steps_carry_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("gptq_cli.events.time.perf_counter", lambda: now[0])
    events: list[Event] = []
    advanced = counted(events.append, "evaluate")
    for done, now[0] in ((0, 100.0), (1, 102.0), (2, 106.0), (4, 108.0)):
        advanced(done, 4)
    left = [event.remaining_seconds for event in events if isinstance(event, PhaseAdvanced)]
    assert left == [None, 6.0, 6.0, None]


def test_a_warm_up_takes_time_but_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("gptq_cli.events.time.perf_counter", lambda: now[0])
    events: list[Event] = []
    advanced = counted(events.append, "bench", uncounted=1)
    for done, now[0] in ((0, 3.0), (1, 6.0), (5, 18.0)):
        advanced(done, 5)
    left = [event.remaining_seconds for event in events if isinstance(event, PhaseAdvanced)]
    assert left == [15.0, 12.0, None]
