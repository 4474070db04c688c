"""What is said while this rank waits for others: for whom, for how long, and when they have come."""

from __future__ import annotations

from gptq_cli.events import Observer, RanksWaited, ignore
from gptq_cli.ranks.watch import Watch

TOLD_AFTER = (1.0, 10.0)
"""Seconds of waiting after which it is said; then every `TOLD_EVERY`, and at once where it is for others."""
TOLD_EVERY = 30.0
_LOOK_EVERY = 1.0


class Waits:
    """Of the main thread of one rank; `observer` is set once there is one."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.observer: Observer = ignore
        self._late: tuple[str, ...] = ()
        self._looked = self._told = 0.0

    def passed(self, seconds: float) -> None:
        """It has waited so long, and goes on."""
        if seconds < TOLD_AFTER[0] or seconds < self._looked + _LOOK_EVERY:
            return
        self._looked, late = seconds, self._watch.late
        due = next((after for after in TOLD_AFTER if after > self._told), self._told + TOLD_EVERY)
        if seconds >= due or late != self._late:
            self._late, self._told = late, seconds
            self.observer(RanksWaited(seconds=seconds, ranks=late))

    def ended(self, seconds: float) -> None:
        """It waits no more."""
        if self._told:
            self.observer(RanksWaited(seconds=seconds, ranks=self._late, over=True))
        self._late, self._looked, self._told = (), 0.0, 0.0
