"""Rows of any source as pieces of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptq_cli.calibration.rows import (
    Render,
    Row,
    default_column,
    has_answer,
    kind,
    known_column,
    messages_of,
    row_text,
)
from gptq_cli.calibration.utf8 import SOURCES_HINT
from gptq_cli.errors import CalibrationError
from gptq_cli.wording import number_of

PIECE_CHARACTERS = 1 << 21
"""About the longest text that is tokenized at once; a longer document is cut, if possible after a line."""


_SPACES = " \t\r\f\v\u00a0\u3000"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text; `opens`: it begins a new document, rather than continuing the last one."""

    text: str
    opens: bool = True
    messages: Sequence[Mapping[str, Any]] | None = None
    """Of a conversation that the chat template wrote as a whole: what it was given; of other texts None."""
    rendered: bool = False
    """It begins a conversation that the chat template wrote."""
    too_long: bool = False
    """It begins a conversation with answers that is longer than a piece, whose answers are not looked for."""
    joined: bool = False
    """It begins a conversation that is its messages in turn, for want of a chat template."""
    table: str = ""
    """It begins a plain text that looks like a table: what kind of one (`text.COMMAS`, …)."""


@dataclass(frozen=True, slots=True)
class Documents:
    """A source: its name for people, and its text, which can be read once."""

    label: str
    pieces: Iterator[Piece]


def rows_to_pieces(
    rows: Iterable[Row], name: str, column: str | None, render: Render | None
) -> Iterator[Piece]:
    """The documents of a table's rows. Null and blank ones are skipped; a table with no other rows is an
    error."""
    count = 0
    written = False
    for place, row in rows:
        count += 1
        value = row
        if isinstance(row, Mapping):
            key_of_text = known_column(
                column or default_column(row),
                list(row),
                f"{name} {place}",
            )
            value = row[key_of_text]
        elif column is not None:
            raise CalibrationError(f"{name} {place} is {kind(row)} and has no column {column!r}")
        text = row_text(value, f"{name} {place}", render)
        if text.strip():
            written = True
            rendered = render is not None and isinstance(value, list)
            messages = messages_of(value, f"{name} {place}") if rendered else None
            if rendered and len(text) <= PIECE_CHARACTERS:
                yield Piece(text, messages=messages, rendered=True)
            else:
                pieces = _cut(text)
                joined = render is None and isinstance(value, list)
                too_long = has_answer(messages or ())
                yield replace(next(pieces), rendered=rendered, too_long=too_long, joined=joined)
                yield from pieces
    if not written:
        what = f"column {column!r} of {name}" if column else name
        raise CalibrationError(f"{what} is empty: {number_of(count, 'row')} and no text", hint=SOURCES_HINT)


def _cut(text: str) -> Iterator[Piece]:
    """One document as pieces."""
    start = 0
    while start < len(text):
        end = _end_of_piece(text, start)
        yield Piece(text[start:end], opens=start == 0)
        start = end


def _end_of_piece(text: str, start: int) -> int:
    """Where a piece that begins at `start` ends: after a line break, else before white space, else anywhere.

    White space belongs to the word after it, as in most tokenizers.
    """
    end = start + PIECE_CHARACTERS
    if end >= len(text):
        return len(text)
    line_break = text.rfind("\n", start, end)
    if line_break >= start:
        return line_break + 1
    space = max(text.rfind(character, start + 1, end) for character in _SPACES)
    return space if space > start else end
