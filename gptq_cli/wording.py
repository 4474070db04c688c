"""Lists, reasons and times inside a sentence: what is long is cut, and says how much was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sized


def names_text(items: Iterable[object], shown: int = 6) -> str:
    """`a, b, c and 12 more`."""
    words = [str(item) for item in items]
    text = ", ".join(words[:shown])
    return f"{text} and {len(words) - shown} more" if len(words) > shown else text


def number_of(number: int, noun: str, one: str = "", many: str = "") -> str:
    """`1 linear`, `2,048 linears`; with the verb that follows, `1 linear stays`, `2,048 linears stay`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    noun, verb = (noun, one) if number == 1 else (plural, many)
    return f"{number:,} {noun}{f' {verb}' if verb else ''}"


def all_of(number: int, noun: str, one: str = "", many: str = "") -> str:
    """`the one linear`, `all 2,048 linears`, with a verb as in `number_of`."""
    words = number_of(number, noun, one, many)
    return f"the one{words.removeprefix('1')}" if number == 1 else f"all {words}"


def and_others(items: Sized, noun: str = "") -> str:
    """What follows the first of `items` in a sentence: ` (and 3 more problems)`, "" where it is the only one.

    `noun` is in the singular.
    """
    left = len(items) - 1
    more = number_of(left, f"more {noun}") if noun else f"{left} more"
    return f" (and {more})" if left > 0 else ""


def first_line(error: BaseException) -> str:
    """What an error says in one line, the second with it where the first ends in a colon; its type where it
    says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def json_fault(error: json.JSONDecodeError) -> str:
    """What is wrong with a JSON text, to be followed by a place: some of Python's messages end in their own
    `at`."""
    return error.msg.removesuffix(" at").removesuffix(" starting")


def as_json(value: object, limit: int = 100) -> str:
    """A value from a JSON file as that file spells it, `true` and `null`; a text in single quotes."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


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
