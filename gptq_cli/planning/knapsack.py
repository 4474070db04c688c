"""One option for each item, so that the sizes fit a budget and the losses are least: solved exactly.

This is the multiple-choice knapsack problem. Three steps lead to the best choice, and to the proof that there
is no better one:

    relax   every item may mix two options. The answer is known: walk along the lower convex hulls, the steps
            that save most loss for each byte first, until the budget is full. The last step's rate λ is what
            a byte is worth; Σ minⱼ (lossⱼ + λ sizeⱼ) - λ budget is below every choice that fits
    round   the steps that fit, also those behind the first that does not: a choice, `gap` above that bound
    repair  an option that costs more than `gap` above the best of its item, at λ, is in no better choice. Of
            those that are left every mixture is tried, item by item; of two that came so far, one that is
            larger and loses more is dropped (Nemhauser and Ullmann 1969)

The gap is about one option's loss in a hundred items, so few options are left for the last step. Where
hundreds of items make too many mixtures, the most promising are kept, and the choice is within the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_MIXTURES = 8_000
"""That are kept from item to item."""
_ROUNDING = 1e-12
"""Relative to all losses: what sums of floats may be off."""


@dataclass(frozen=True, slots=True)
class Option:
    """What an item can be."""

    size_bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice: the option of every item, by its place."""

    places: tuple[int, ...]
    size_bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class _Step:
    """From one option on the hull of an item to the next larger one."""

    item: int
    place: int
    size_bytes: int
    saved: float

    @property
    def rate(self) -> float:
        """Loss saved for each byte."""
        return self.saved / self.size_bytes


def choose(items: Sequence[Sequence[Option]], budget: int) -> Chosen | None:
    """The choice of least loss whose sizes add up to at most `budget`; None where the smallest do not fit.

    Equal input gives an equal choice; of several that are best, which one is not said.
    """
    least = [min(enumerate(item), key=lambda placed: _smallest(placed[1]))[0] for item in items]
    start = _chosen(items, least)
    if start.size_bytes > budget:
        return None
    rounded, price = _rounded(items, start, budget)
    floors = [min(option.loss + price * option.size_bytes for option in item) for item in items]
    slack = _ROUNDING * (sum(abs(floor) for floor in floors) + price * budget)
    gap = max(0.0, rounded.loss - (sum(floors) - price * budget)) + slack
    left = [
        [at for at, one in enumerate(item) if one.loss + price * one.size_bytes - floor <= gap]
        for item, floor in zip(items, floors, strict=True)
    ]
    return _repaired(items, left, price, floors, gap, budget, rounded)


def _smallest(option: Option) -> tuple[int, float]:
    return option.size_bytes, option.loss


def _chosen(items: Sequence[Sequence[Option]], places: Sequence[int]) -> Chosen:
    held = [item[place] for item, place in zip(items, places, strict=True)]
    return Chosen(tuple(places), sum(one.size_bytes for one in held), sum(one.loss for one in held))


def hull(item: Sequence[Option]) -> list[int]:
    """The places of the options that are best at some price of a byte, from the smallest to the largest."""
    found: list[int] = []
    for at in sorted(range(len(item)), key=lambda place: (*_smallest(item[place]), place)):
        if found and item[at].loss >= item[found[-1]].loss:
            continue
        while len(found) > 1 and _rate(item, found[-2], found[-1]) <= _rate(item, found[-1], at):
            found.pop()
        if found and item[found[-1]].size_bytes == item[at].size_bytes:
            continue
        found.append(at)
    return found


def _rate(item: Sequence[Option], small: int, large: int) -> float:
    size_bytes = item[large].size_bytes - item[small].size_bytes
    return (item[small].loss - item[large].loss) / size_bytes


def _rounded(items: Sequence[Sequence[Option]], start: Chosen, budget: int) -> tuple[Chosen, float]:
    """A choice that fits, and what a byte is worth: 0 where every step fits."""
    steps = [
        _Step(
            number,
            large,
            item[large].size_bytes - item[small].size_bytes,
            item[small].loss - item[large].loss,
        )
        for number, item in enumerate(items)
        for small, large in pairwise(hull(item))
    ]
    steps.sort(key=lambda step: (-step.rate, step.item, step.size_bytes))
    places, room, price = list(start.places), budget - start.size_bytes, 0.0
    stopped: set[int] = set()
    for step in steps:
        if step.item in stopped:
            continue
        if step.size_bytes > room:
            price = price or step.rate
            stopped.add(step.item)
            continue
        places[step.item] = step.place
        room -= step.size_bytes
    return _chosen(items, places), price


@dataclass(frozen=True, slots=True)
class _Mixture:
    """Options for the first items."""

    size_bytes: int
    loss: float
    above: float
    """What they cost above the best of their items, at the price of a byte."""
    place: int
    before: _Mixture | None

    def places(self) -> list[int]:
        """Of all its items."""
        found: list[int] = []
        mixture: _Mixture | None = self
        while mixture is not None and mixture.before is not None:
            found.append(mixture.place)
            mixture = mixture.before
        return found[::-1]


def _repaired(
    items: Sequence[Sequence[Option]],
    left: Sequence[Sequence[int]],
    price: float,
    floors: Sequence[float],
    gap: float,
    budget: int,
    best: Chosen,
) -> Chosen:
    """The best mixture of the options that are `left`, or `best` where none is better."""
    smallest = [min(items[number][at].size_bytes for at in places) for number, places in enumerate(left)]
    needed = sum(smallest)
    kept = [_Mixture(0, 0.0, 0.0, -1, None)]
    for number, places in enumerate(left):
        needed -= smallest[number]
        made: list[_Mixture] = []
        for at in places:
            option = items[number][at]
            own = option.loss + price * option.size_bytes - floors[number]
            for mixture in kept:
                size_bytes, above = mixture.size_bytes + option.size_bytes, mixture.above + own
                if above <= gap and size_bytes + needed <= budget:
                    made.append(_Mixture(size_bytes, mixture.loss + option.loss, above, at, mixture))
        kept = _undominated(made)
        if len(kept) > MAX_MIXTURES:
            kept = sorted(kept, key=lambda one: one.above)[:MAX_MIXTURES]
    for mixture in kept:
        found = _chosen(items, mixture.places())
        if (found.loss, found.size_bytes) < (best.loss, best.size_bytes):
            best = found
    return best


def _undominated(made: list[_Mixture]) -> list[_Mixture]:
    """Without those that another one undercuts in size and in loss."""
    found: list[_Mixture] = []
    for mixture in sorted(made, key=lambda one: (one.size_bytes, one.loss)):
        if not found or mixture.loss < found[-1].loss:
            found.append(mixture)
    return found
