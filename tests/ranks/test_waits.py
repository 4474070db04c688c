"""What is said while a rank waits, with a clock of the test."""

from __future__ import annotations

from typing import Any

from gptq_cli.events import RanksWaited
from gptq_cli.ranks.waits import Waits


class Known:
    """What the watch knows of the others."""

    late: tuple[str, ...] = ("rank 1 on b", "rank 2 on b")


def said(passed: list[float], known: Any, come: dict[float, tuple[str, ...]] | None = None) -> list[Any]:
    events: list[Any] = []
    waits = Waits(known)
    waits.observer = events.append
    for seconds in passed:
        known.late = (come or {}).get(seconds, known.late)
        waits.passed(seconds)
    waits.ended(passed[-1])
    return events


def test_a_short_wait_is_not_told() -> None:
    assert said([0.001, 0.5, 0.99], Known()) == []


def test_a_long_one_is_told_now_and_then_and_when_it_is_over() -> None:
    found = said([n / 4 for n in range(1, 400)], Known())
    assert [(one.seconds, one.over) for one in found] == [
        (1.0, False),
        (10.0, False),
        (40.0, False),
        (70.0, False),
        (99.75, True),
    ]
    assert {one.ranks for one in found} == {("rank 1 on b", "rank 2 on b")}


def test_when_one_has_come_the_others_are_told() -> None:
    found = said([1.0, 2.0, 3.0], Known(), {3.0: ("rank 2 on b",)})
    assert found == [
        RanksWaited(seconds=1.0, ranks=("rank 1 on b", "rank 2 on b")),
        RanksWaited(seconds=3.0, ranks=("rank 2 on b",)),
        RanksWaited(seconds=3.0, ranks=("rank 2 on b",), over=True),
    ]
