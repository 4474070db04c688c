"""Where calibration text comes from, and how much of it from each place: `chat.jsonl:messages*0.5`.

A source is a name that `gptq_cli.calibration.text` opens; what follows its last `*` is its weight. Weights
are relative: `a*3 b*1` and `a*0.75 b*0.25` are the same, and a source without one has 1. A file with a `*` in
its name is given with a weight behind it: `notes*2.txt*1`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gptq_cli.errors import ConfigError

_NUMBER = re.compile(r"[0-9]{0,20}\.?[0-9]{1,20}(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
OWN_TEXT = "self"
"""The source that stands for what the model itself writes."""
SOURCES = "pydoc, self, a file, '-', or a Hub data set"
MAX_SOURCES = 64


@dataclass(frozen=True, slots=True)
class TextSource:
    """A source of text and its weight among the others."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError(f"calibration is empty; allowed: {SOURCES}")
        if not (isinstance(self.weight, int | float) and math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"the weight of {self.name!r} is {self.weight!r}; allowed: a number above 0, as in "
                f"{self.name}*0.5"
            )

    @classmethod
    def parse(cls, text: str) -> TextSource:
        """`pydoc*0.5`, or a name alone. Raises `ConfigError`."""
        name, star, weight = text.rpartition("*")
        if not star:
            return cls(text)
        if _NUMBER.fullmatch(weight.strip()) is None:
            raise ConfigError(
                f"the weight of {name!r} is {weight!r}; allowed: a number above 0, as in {name}*0.5",
                hint=f"where the * belongs to the name: {text}*1",
            )
        return cls(name, float(weight))

    def __str__(self) -> str:
        """As `parse` reads it: no digit of the weight is lost."""
        if self.weight == 1 and "*" not in self.name:
            return self.name
        short, exact = f"{self.weight:g}", repr(float(self.weight))
        return f"{self.name}*{short if float(short) == self.weight else exact}"


def parse_sources(given: object) -> tuple[TextSource, ...]:
    """Sources as a person gives them: one text, a path, or several of either. Raises `ConfigError`."""
    items = (given,) if isinstance(given, str | os.PathLike | TextSource) else given
    if not isinstance(items, Iterable):
        raise ConfigError(f"calibration is {given!r}; allowed: {SOURCES}, or several of them")
    found = []
    for item in items:
        if isinstance(item, TextSource):
            found.append(item)
        elif isinstance(item, os.PathLike):
            found.append(TextSource(os.fspath(item)))
        elif isinstance(item, str):
            found.append(TextSource.parse(item))
        else:
            raise ConfigError(f"calibration holds {item!r}; allowed: {SOURCES}")
    check_sources(found)
    return tuple(found)


def check_sources(sources: Sequence[TextSource]) -> None:
    """Raise `ConfigError` where there is none, or one twice: it would give the same windows again."""
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise ConfigError(f"calibration names {len(sources)} sources; allowed: 1 to {MAX_SOURCES}")
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"calibration names {twice!r} {names.count(twice)} times; allowed: each source once",
            hint=f"give it a larger weight instead: {twice}*2",
        )


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` windows divided by weight, at least one for each; what is left over goes to the largest
    fractions, the first of equal ones first. `total` is at least the number of weights."""
    spare = total - len(weights)
    largest = max(weights)  # of finite weights the sum may overflow
    scaled = [weight / largest for weight in weights]
    exact = [max(0.0, total * part / sum(scaled) - 1) for part in scaled]
    fitted = [spare * part / sum(exact) if spare else 0.0 for part in exact]
    whole = [math.floor(part) for part in fitted]
    order = sorted(range(len(weights)), key=lambda index: (whole[index] - fitted[index], index))
    for index in order[: spare - sum(whole)]:
        whole[index] += 1
    return tuple(1 + part for part in whole)


def interleaved(counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(source, window) of all windows in an order in which every stretch holds the sources by their shares.

    The engine takes some of the samples for steps of its own: each of these should see every source.
    """
    sources = enumerate(counts)
    places = [((index + 0.5) / count, source, index) for source, count in sources for index in range(count)]
    return tuple((source, index) for _, source, index in sorted(places))
