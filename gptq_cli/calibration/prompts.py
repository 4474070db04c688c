"""What a model is asked when it writes its own calibration text: the page `prompts.txt`.

Requests are of many kinds and languages, because the Hessians should see what the model will be used for:
explaining, stories, code, sums, tables, answers in other languages. A model without a chat template gets
openings instead, which it continues. Every fifth line of a section is held out: with them it writes the text
that it is measured on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("prompts.txt")
HELD_OUT_EVERY = 5
_OPENINGS = "openings"


@dataclass(frozen=True, slots=True)
class Prompts:
    """One part of the page."""

    requests: tuple[str, ...]
    openings: tuple[str, ...]


def read_prompts(*, held_out: bool) -> Prompts:
    """The lines that calibration uses, or those that are held out from it, in the order of the page."""
    requests: list[str] = []
    openings: list[str] = []
    section, number = "", 0
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("# "):
            continue
        if line.startswith("[") and line.endswith("]"):
            section, number = line[1:-1], 0
            continue
        number += 1
        if (number % HELD_OUT_EVERY == 0) is held_out:
            (openings if section == _OPENINGS else requests).append(line)
    return Prompts(tuple(requests), tuple(openings))


def page_digest() -> str:
    """SHA-256 of the page: another page is another text."""
    return hashlib.sha256(PAGE.read_bytes()).hexdigest()
