"""Where text comes from: one word or path in, a lazy stream of documents out.

    pydoc, pydoc-heldout     English of the standard library (`stdlib_text`)
    -                        standard input: plain UTF-8 text, one document
    FILE.txt                 plain UTF-8 text, one document (any suffix that is not listed below)
    FILE.jsonl[:column]      a JSON object (or string) a line, a document each
    FILE.json[:column]       a list of objects or of strings
    FILE.parquet[:column]    a table, a document a row
    wikitext2, c4, ID[:config[:split[:column]]]     a data set of the hub (`hub`)

A path that exists is that path, whatever it looks like: hub names are tried last. Without a column, `text`
is read, or `messages` (a conversation, rendered through the model's chat template). A document is handed
out in pieces of bounded length, so that a file larger than memory can be read until there is enough. A file
may be a pipe (`<(…)`, /dev/stdin), which is read once.

Everything wrong with a source is a `CalibrationError` that names the place in the file and the way out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from gptq_cli.calibration import stdlib_text
from gptq_cli.calibration.rows import (
    STANDARD_COLUMNS,
    Render,
    Row,
    json_lines,
    json_rows,
    kind,
    known_column,
    parquet_rows,
    row_text,
)
from gptq_cli.calibration.utf8 import PACKED, STANDARD_INPUT, WAYS_OUT, chunks, opened
from gptq_cli.errors import CalibrationError
from gptq_cli.files import Kind, expanded, kind_of, reason, shown

PIECE_CHARACTERS = 1 << 21
"""About the longest text that is tokenized at once; a longer document is cut, after a line if it has any."""

TABLES = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".json": "JSON", ".parquet": "Parquet"}
_SPACES = " \t\r\f\v\u00a0\u3000"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text; `opens` says that it begins a new document rather than going on with the last one."""

    text: str
    opens: bool = True


@dataclass(frozen=True, slots=True)
class Documents:
    """A source: its name for people, and its text, which can be read once."""

    label: str
    pieces: Iterator[Piece]


def read_documents(source: str, *, render: Render | None = None, stdin: BinaryIO | None = None) -> Documents:
    """Open `source`; see the module's table. Text is read while `pieces` is iterated.

    `render` turns a conversation into text (None: contents joined by blank lines). `stdin` stands in for
    the process's standard input. Raises `CalibrationError`, here or while iterating.
    """
    if source == "-":
        return Documents(STANDARD_INPUT, _text_to_pieces(_stdin(stdin), STANDARD_INPUT))
    if source in ("pydoc", "pydoc-heldout"):
        texts = stdlib_text.stdlib_documents(evaluation=source == "pydoc-heldout")
        return Documents(stdlib_text.label(source), (Piece(text) for text in texts))
    found = find_file(source)
    if found is None:
        _refuse_missing_path(source)
        from gptq_cli.calibration import hub

        return hub.read_hub(source, render)
    path, column = found
    name = str(path) if column is None else f"{path}:{column}"
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        if column is not None:
            raise CalibrationError(
                f"{path} is plain text and has no column {column!r}; "
                f"columns are read from {', '.join(TABLES)} files",
                hint=f"use --calibration {path}",
            )
        return Documents(name, _text_file(path))
    return Documents(name, rows_to_pieces(reader(path, column), str(path), column, render))


def find_file(source: str) -> tuple[Path, str | None] | None:
    """`(file, column or None)` when `source` names an existing file, else None.

    The whole text is tried first, so a colon may be part of a path (`C:\\data\\a.jsonl`); then what stands
    before the last colon.
    """
    path, looked = expanded(source), _look(expanded(source))
    if looked in ("file", "pipe"):
        return path, None
    before, colon, column = source.rpartition(":")
    if colon and before and _look(expanded(before)) in ("file", "pipe"):
        if not column:
            raise CalibrationError(
                f"{source!r} ends in a colon, without a column", hint=f"--calibration {before}:text"
            )
        return expanded(before), column
    if isinstance(looked, OSError):
        raise CalibrationError(f"cannot read {shown(source)}: {reason(looked)}", hint=WAYS_OUT) from looked
    if looked == "directory":
        raise CalibrationError(
            f"{source} is a directory; allowed: a file", hint=f"cat {source}/* | gptq … --calibration -"
        )
    if looked == "device":
        raise CalibrationError(f"{source} is a device; allowed: a file or a pipe", hint=WAYS_OUT)
    return None


def _look(path: Path) -> Kind | OSError | None:
    try:
        return kind_of(path)
    except OSError as error:  # nobody may look there, or no file system has such a name
        return error


def _refuse_missing_path(source: str) -> None:
    """Raise where `source` was plainly meant as a path; a hub is not asked for `./notes.txt`."""
    head = re.split(r":(?![\\/])", source)[0] if not re.match(r"^[A-Za-z]:[\\/]", source) else source
    suffix = Path(head).suffix.lower()
    if (
        head.startswith(("/", "./", "../", "~", ".\\", "..\\"))
        or "\\" in head
        or suffix in {*TABLES, *PACKED, ".txt", ".md"}
    ):
        raise CalibrationError(f"calibration file {shown(head)} does not exist", hint=WAYS_OUT)


def _stdin(stand_in: BinaryIO | None) -> BinaryIO:
    stream = stand_in if stand_in is not None else getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise CalibrationError("standard input is closed, and --calibration is '-'", hint=WAYS_OUT)
    if stream.isatty():
        raise CalibrationError(
            "standard input is a terminal, and --calibration is '-'",
            hint="pipe text into it: cat FILE | gptq quantize … --calibration -",
        )
    return stream


def _text_file(path: Path) -> Iterator[Piece]:
    with opened(path) as stream:
        yield from _text_to_pieces(stream, str(path))


def _text_to_pieces(stream: BinaryIO, name: str) -> Iterator[Piece]:
    """One document, in pieces of `PIECE_CHARACTERS` and the rest of a line, if it is not endless."""
    text = ""
    opens = True
    for chunk in chain(chunks(stream, name), ("",)):
        text += chunk
        while len(text) > (2 * PIECE_CHARACTERS if chunk else PIECE_CHARACTERS):
            line_break = text.find("\n", PIECE_CHARACTERS - 1, 2 * PIECE_CHARACTERS)
            end = line_break + 1 if line_break >= 0 else _end_of_piece(text, 0)
            yield Piece(text[:end], opens)
            text, opens = text[end:], False
    if text:
        yield Piece(text, opens)


_READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_rows,
    ".parquet": parquet_rows,
}


def rows_to_pieces(
    rows: Iterable[Row], name: str, column: str | None, render: Render | None
) -> Iterator[Piece]:
    """The documents of a table's rows. Null and blank ones are passed over; only such ones are an error."""
    count = 0
    written = False
    for place, row in rows:
        count += 1
        value = row
        if isinstance(row, Mapping):
            chosen = known_column(
                column or next((key for key in STANDARD_COLUMNS if key in row), None),
                list(row),
                f"{name} {place}",
            )
            value = row[chosen]
        elif column is not None:
            raise CalibrationError(f"{name} {place} is a JSON {kind(row)} and has no column {column!r}")
        text = row_text(value, f"{name} {place}", render)
        if text.strip():
            written = True
            yield from _cut(text)
    if not written:
        what = f"column {column!r} of {name}" if column else name
        raise CalibrationError(f"{what} is empty: {count} rows and no text", hint=WAYS_OUT)


def _cut(text: str) -> Iterator[Piece]:
    """One document as pieces."""
    start = 0
    while start < len(text):
        end = _end_of_piece(text, start)
        yield Piece(text[start:end], opens=start == 0)
        start = end


def _end_of_piece(text: str, start: int) -> int:
    """Where a piece that begins at `start` ends: after a line break, else before white space, else anywhere.

    White space goes with the word behind it, as most tokenizers have it.
    """
    end = start + PIECE_CHARACTERS
    if end >= len(text):
        return len(text)
    line_break = text.rfind("\n", start, end)
    if line_break >= start:
        return line_break + 1
    space = max(text.rfind(character, start + 1, end) for character in _SPACES)
    return space if space > start else end
