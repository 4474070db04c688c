"""Lists, reasons and times inside a sentence: what is long is cut, and says how much was left out."""

from __future__ import annotations

from collections.abc import Iterable, Sized


def names_text(items: Iterable[object], shown: int = 6) -> str:
    """`a, b, c and 12 more`."""
    words = [str(item) for item in items]
    text = ", ".join(words[:shown])
    return f"{text} and {len(words) - shown} more" if len(words) > shown else text


def and_others(items: Sized, noun: str = "") -> str:
    """What follows the first of `items` in a sentence: ` (and 3 more problems)`, "" where it is the only one.

    `noun` is in the plural.
    """
    left = len(items) - 1
    return f" (and {left} more{f' {noun}' if noun else ''})" if left > 0 else ""


def first_line(error: BaseException) -> str:
    """What an error says in one line; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


BUSY = 0.25
"""A larger share of the time spent waiting for a processor is worth a word."""


def busy_words(waited_share: float | None) -> str:
    """That other work keeps the processors busy, where the work waited for one for much of its time."""
    if waited_share is None or waited_share <= BUSY:
        return ""
    return f"other work keeps the processors busy: the probe waited for one {waited_share:.0%} of its time"


def duration_words(seconds: float) -> str:
    """`38 s`, `41 min`, `3 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
