"""Where text comes from: a name or a path in, a lazy stream of documents out.

    pydoc, pydoc-heldout     English of the standard library (`stdlib_text`)
    self                     what the model itself writes (`own_text`): no source that can be read here
    -                        standard input: plain UTF-8 text, one document
    FILE.txt                 plain UTF-8 text, one document (any suffix that is not listed below)
    FILE.jsonl[:column]      one JSON object (or string) per line, each a document
    FILE.json[:column]       a list of objects or of strings
    FILE.parquet[:column]    a table, one document per row
    wikitext2, c4, ID[:config[:split[:column]]]     a data set on the Hub (`hub`)

An existing path is always taken as a path; names on the Hub are tried last. Without a column, `text` is read,
or `messages` (a conversation, rendered through the model's chat template). Documents come in pieces of
bounded length, so that a file larger than memory can be read until there is enough text. A file may be a pipe
(`<(…)`, /dev/stdin), which is read once.

Every fault of a source is a `CalibrationError` that names the place in the file and says what to do.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from gptq_cli.calibration import stdlib_text
from gptq_cli.calibration.documents import (
    PIECE_CHARACTERS,
    Documents,
    Piece,
    _end_of_piece,
    rows_to_pieces,
)
from gptq_cli.calibration.rows import (
    Render,
    Row,
    default_column,
    json_lines,
    json_rows,
    parquet_rows,
)
from gptq_cli.calibration.utf8 import PACKED, SOURCES_HINT, STANDARD_INPUT, chunks, opened
from gptq_cli.errors import CalibrationError
from gptq_cli.files import Kind, expanded, kind_of, reason, shown
from gptq_cli.text_sources import OWN_TEXT

TOKENS_PER_BYTE = 12
"""More than any tokenizer makes of a text: normalization writes out a ligature of 3 bytes in 33."""
_NAMES = ("-", "pydoc", "pydoc-heldout", OWN_TEXT)
TABLES = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".json": "JSON", ".parquet": "Parquet"}


def read_documents(source: str, *, render: Render | None = None, stdin: BinaryIO | None = None) -> Documents:
    """Open `source`; see the module's table. Text is read while `pieces` is iterated.

    `render` turns a conversation into text (None: contents joined by blank lines). `stdin` replaces
    the process's standard input. Raises `CalibrationError`, here or while iterating.
    """
    if source == "-":
        return Documents(STANDARD_INPUT, _text_to_pieces(_stdin(stdin), STANDARD_INPUT))
    if source in ("pydoc", "pydoc-heldout"):
        texts = stdlib_text.stdlib_documents(evaluation=source == "pydoc-heldout")
        return Documents(stdlib_text.label(source), (Piece(text) for text in texts))
    if source == OWN_TEXT:
        raise CalibrationError(f"{source} is what the model writes, not a text that can be read")
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
            as_text = f"use --calibration {source.rpartition(':')[0]}"
            raise CalibrationError(
                f"{path} is plain text and has no column {column!r}; "
                f"columns are read from {', '.join(TABLES)} files",
                hint=AS_ROWS if path.suffix.lower() in _SPREADSHEETS else as_text,
            )
        return Documents(name, _text_file(path))
    return Documents(name, rows_to_pieces(reader(path, column), str(path), column, render))


JSON_LINES, JSON_ROWS = TABLES[".jsonl"], TABLES[".json"]
_SPREADSHEETS = {".csv": "comma-separated values", ".tsv": "tab-separated values"}
AS_ROWS = "write its rows as .jsonl: pandas.read_csv(…).to_json('rows.jsonl', orient='records', lines=True)"
"""A table of commas is not read as one: as plain text it would calibrate on commas and numbers, too."""
_LOOKED_AT, _LOOKED_AT_LINES = 1 << 20, 5
"""Characters and lines of a plain text that may be JSON under another name."""


def check_source(source: str) -> None:
    """Raise the `CalibrationError` that reading `source` would begin with. Nothing is read, no Hub asked."""
    if source in _NAMES:
        return
    if find_file(source) is None:
        _refuse_missing_path(source)
    else:
        read_documents(source)  # which opens nothing yet


def check_distinct(sources: Sequence[str]) -> None:
    """Raise `CalibrationError` where two names are of one text: it would give the same windows again.

    Of a table named without a column its first row is read, where the same file is named twice. Of data sets
    on the Hub only names are compared.
    """
    files = [(name, find_file(name)) for name in sources if name not in _NAMES]
    places = [(os.path.realpath(found[0]), name, found) for name, found in files if found is not None]
    texts: list[tuple[tuple[str | None, ...], str]] = [
        ((place, column or _default_column(path)), name)
        for place, name, (path, column) in places
        if sum(place == other for other, _, _ in places) > 1
    ]
    texts += [(_hub_text(name), name) for name, found in files if found is None]
    known: dict[tuple[str | None, ...], str] = {}
    for text, name in texts:
        first = known.setdefault(text, name)
        if first != name:
            raise CalibrationError(
                f"{first!r} and {name!r} are one text; allowed: each source once",
                hint=f"give it a larger weight instead: {first}*2",
            )


def _hub_text(name: str) -> tuple[str, ...]:
    from gptq_cli.calibration import hub

    try:
        return hub.hub_text(name)
    except CalibrationError:  # it is no name of a data set, which is said when it is read
        return (name,)


def _default_column(path: Path) -> str | None:
    """The column that is read of a table where none is named; None of other texts, and of empty tables."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        return None
    _, row = next(reader(path, None), ("", None))
    if not isinstance(row, Mapping):
        return None
    return default_column(row)


_MEASURING = (
    (r"--calibration pydoc(?![\w.*/-])", "--eval pydoc-heldout"),
    ("--calibration", "--eval"),
    ("quantize …", "load …"),
)
"""Words of hints, and what takes their place in errors about --eval: pydoc is what runs calibrate on."""


@contextmanager
def to_measure_on(source: str) -> Iterator[None]:
    """Let errors about `source` speak of --eval, which names one text, without a weight."""
    try:
        name, star, _ = source.rpartition("*")
        if star and find_file(source) is None:  # no data set has a * in its name
            raise CalibrationError(
                f"{source!r} is not a file, and --eval takes no weight: it names one text",
                hint=f"--calibration {name}",
            )
        yield
    except CalibrationError as error:
        hint = error.hint or ""
        for calibrating, measuring in _MEASURING:
            hint = re.sub(calibrating, measuring, hint)
        raise CalibrationError(error.message, hint=hint or None) from error


def too_few_bytes(source: str, tokens: int) -> int | None:
    """The bytes of a plain text that cannot make so many tokens, whatever the tokenizer; else None."""
    found = find_file(source) if source not in _NAMES else None
    if found is None or found[0].suffix.lower() in {*TABLES, *PACKED} or not found[0].is_file():
        return None
    size = found[0].stat().st_size
    return size if size * TOKENS_PER_BYTE < tokens else None


def find_file(source: str) -> tuple[Path, str | None] | None:
    """`(file, column or None)` when `source` names an existing file, else None.

    All of `source` is tried as a path first, so a colon may be part of it (`C:\\data\\a.jsonl`); then the
    part before the last colon.
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
        raise CalibrationError(
            f"cannot read {shown(source)}: {reason(looked)}", hint=SOURCES_HINT
        ) from looked
    if looked == "directory":
        raise CalibrationError(
            f"{source} is a directory; allowed: a file", hint=f"cat {source}/* | gptq … --calibration -"
        )
    if looked == "device":
        raise CalibrationError(f"{source} is a device; allowed: a file or a pipe", hint=SOURCES_HINT)
    return None


def _look(path: Path) -> Kind | OSError | None:
    try:
        return kind_of(path)
    except OSError as error:  # no permission to look there, or a name that no file system allows
        return error


def _refuse_missing_path(source: str) -> None:
    """Raise where `source` is clearly a path: the Hub is not asked for `./notes.txt`."""
    head = re.split(r":(?![\\/])", source)[0] if not re.match(r"^[A-Za-z]:[\\/]", source) else source
    suffix = Path(head).suffix.lower()
    if (
        head.startswith(("/", "./", "../", "~", ".\\", "..\\"))
        or "\\" in head
        or suffix in {*TABLES, *PACKED, ".txt", ".md"}
    ):
        raise CalibrationError(f"{shown(head)} does not exist", hint=SOURCES_HINT)


def _stdin(stand_in: BinaryIO | None) -> BinaryIO:
    stream = stand_in if stand_in is not None else getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise CalibrationError("standard input is closed, and the text is '-'", hint=SOURCES_HINT)
    if stream.isatty():
        raise CalibrationError(
            "standard input is a terminal, and the text is '-'",
            hint="pipe text into it: cat FILE | gptq quantize … --calibration -",
        )
    return stream


def _text_file(path: Path) -> Iterator[Piece]:
    with opened(path) as stream:
        yield from _text_to_pieces(stream, str(path), _SPREADSHEETS.get(path.suffix.lower(), ""))


def _text_to_pieces(stream: BinaryIO, name: str, table: str = "") -> Iterator[Piece]:
    """One document, in pieces of about `PIECE_CHARACTERS`, each ending with a line unless that is very
    long. `table`: what its name says that it is."""
    text = ""
    opens = True
    for chunk in chain(chunks(stream, name), ("",)):
        text += chunk
        while len(text) > (2 * PIECE_CHARACTERS if chunk else PIECE_CHARACTERS):
            line_break = text.find("\n", PIECE_CHARACTERS - 1, 2 * PIECE_CHARACTERS)
            end = line_break + 1 if line_break >= 0 else _end_of_piece(text, 0)
            yield Piece(text[:end], opens, table=(table or _look_of(text)) if opens else "")
            text, opens = text[end:], False
    if text:
        yield Piece(text, opens, table=(table or _look_of(text)) if opens else "")


def _look_of(text: str) -> str:
    """What a plain text is that begins as JSON does, with objects one a line or in a list; "" for others."""
    if _begins_a_list(text):
        return JSON_ROWS
    lines = list(islice((line for line in io.StringIO(text[:_LOOKED_AT]) if line.strip()), _LOOKED_AT_LINES))
    if len(lines) > 1 and not lines[-1].endswith("\n") and len(text) > _LOOKED_AT:
        del lines[-1]  # it is cut
    return JSON_LINES if lines and all(map(_is_object, lines)) else ""


def _begins_a_list(text: str) -> bool:
    opening = re.match(r"\s*\[\s*(?=\{)", text)
    try:
        return opening is not None and bool(json.JSONDecoder().raw_decode(text, opening.end())[0])
    except (ValueError, RecursionError):
        return False


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


_READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_rows,
    ".parquet": parquet_rows,
}
