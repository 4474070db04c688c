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
out in pieces of bounded length, so that a file larger than memory can be read until there is enough.

Everything wrong with a source is a `CalibrationError` that names the place in the file and the way out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gptq_cli.calibration import stdlib_text
from gptq_cli.errors import CalibrationError

PIECE_CHARACTERS = 1 << 21
"""Longest text that is tokenized at once; a longer document is cut after a line break."""

TABLES = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".json": "JSON", ".parquet": "Parquet"}
STANDARD_COLUMNS = ("text", "messages")
WAYS_OUT = "use --calibration pydoc (needs no file), or a .txt, .jsonl, .json or .parquet file, or '-'"

Render = Callable[[Any], str]
"""A conversation (a list of messages) -> text. May raise anything: a template is the model author's code."""


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
        return Documents("standard input", _lines_to_pieces(_stdin(stdin), "standard input"))
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
    path = Path(source).expanduser()
    if path.is_file():
        return path, None
    before, colon, column = source.rpartition(":")
    if colon and before and Path(before).expanduser().is_file():
        if not column:
            raise CalibrationError(
                f"{source!r} ends in a colon, without a column", hint=f"--calibration {before}:text"
            )
        return Path(before).expanduser(), column
    if path.is_dir():
        raise CalibrationError(
            f"{source} is a directory; allowed: a file", hint=f"cat {source}/* | gptq … --calibration -"
        )
    return None


def _refuse_missing_path(source: str) -> None:
    """Raise where `source` was plainly meant as a path; a hub is not asked for `./notes.txt`."""
    head = re.split(r":(?![\\/])", source)[0] if not re.match(r"^[A-Za-z]:[\\/]", source) else source
    suffix = Path(head).suffix.lower()
    if (
        head.startswith(("/", "./", "../", "~", ".\\", "..\\"))
        or "\\" in head
        or suffix in {*TABLES, ".txt", ".md"}
    ):
        raise CalibrationError(f"calibration file {head} does not exist", hint=WAYS_OUT)


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
    with _opened(path) as stream:
        yield from _lines_to_pieces(stream, str(path))


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}", hint=WAYS_OUT) from error


def _decoded_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) of UTF-8 text; line ends become "\\n", a byte order mark is dropped."""
    position = 0
    number = 0
    try:
        for number, raw in enumerate(stream, start=1):
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            yield number, f"{text[:-2]}\n" if text.endswith("\r\n") else text
            position += len(raw)
    except UnicodeDecodeError as error:
        bad, offset = error.object[error.start], position + error.start
        raise CalibrationError(
            f"{name} is not UTF-8: byte 0x{bad:02x} at line {number}, byte {offset} of the file",
            hint=f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {name} > utf8.txt",
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read {name}: {error}", hint=WAYS_OUT) from error


def _lines_to_pieces(stream: BinaryIO, name: str) -> Iterator[Piece]:
    """One document, in pieces that end at a line break."""
    lines: list[str] = []
    size = 0
    opens = True
    for _, line in _decoded_lines(stream, name):
        lines.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield Piece("".join(lines), opens)
            lines, size, opens = [], 0, False
    if lines:
        yield Piece("".join(lines), opens)


Row = tuple[str, Any]
"""Where the row stands, for messages ("line 3"), and what it holds: an object, a string, anything."""


def _json_lines(path: Path, column: str | None) -> Iterator[Row]:
    with _opened(path) as stream:
        for number, line in _decoded_lines(stream, str(path)):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(
                    f"{path} line {number} is no JSON: {error.msg} at column {error.colno}: "
                    f"{line.strip()[:60]!r}",
                    hint="every line of a .jsonl file is one JSON object; plain text belongs in a .txt file",
                ) from error


def _json_rows(path: Path, column: str | None) -> Iterator[Row]:
    with _opened(path) as stream:
        text = "".join(line for _, line in _decoded_lines(stream, str(path)))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = (
            "a JSON object a line is the .jsonl format: rename the file"
            if error.msg == "Extra data"
            else None
        )
        raise CalibrationError(
            f"{path} is no JSON: {error.msg} at line {error.lineno}, column {error.colno}", hint=hint
        ) from error
    if not isinstance(value, list):
        raise CalibrationError(
            f"{path} holds a JSON {_kind(value)}; allowed: a list of objects or of strings",
            hint="one object a line is the .jsonl format",
        )
    for number, row in enumerate(value, start=1):
        yield f"item {number}", row


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if not names:
            return
        wanted = column or next((name for name in STANDARD_COLUMNS if name in names), names[0])
        _known_column(wanted if column or wanted in STANDARD_COLUMNS else None, names, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[wanted]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"row {number}", {wanted: value}
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CalibrationError(f"{path} is no readable Parquet file: {reason}", hint=WAYS_OUT) from error


_READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
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
            chosen = _known_column(
                column or next((key for key in STANDARD_COLUMNS if key in row), None),
                list(row),
                f"{name} {place}",
            )
            value = row[chosen]
        elif column is not None:
            raise CalibrationError(f"{name} {place} is a JSON {_kind(row)} and has no column {column!r}")
        text = _row_text(value, f"{name} {place}", render)
        if text.strip():
            written = True
            yield from _cut(text)
    if not written:
        what = f"column {column!r} of {name}" if column else name
        raise CalibrationError(f"{what} is empty: {count} rows and no text", hint=WAYS_OUT)


def _known_column(column: str | None, names: list[str], place: str) -> str:
    if column is None or column not in names:
        listed = ", ".join(map(str, names)) or "none"
        missing = "no column 'text' or 'messages'" if column is None else f"no column {column!r}"
        raise CalibrationError(
            f"{place} has {missing}; columns: {listed}", hint="name the column after a colon: FILE:COLUMN"
        )
    return column


def _row_text(value: Any, place: str, render: Render | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, Mapping) and "role" in item for item in value):
        if render is None:
            return "\n\n".join(str(message.get("content") or "") for message in value)
        try:
            return render(value)
        except Exception as error:  # a chat template is code of the model's author
            raise CalibrationError(
                f"{place}: the model's chat template refuses the conversation: {error}",
                hint="name a column of plain text after a colon: FILE:COLUMN",
            ) from error
    raise CalibrationError(
        f"{place} is a JSON {_kind(value)}; allowed: text, or a list of messages with a role and a content"
    )


def _cut(text: str) -> Iterator[Piece]:
    """One document as pieces; cut after a line break, or anywhere when a line is longer than a piece."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            line_break = text.rfind("\n", start, end)
            end = line_break + 1 if line_break >= start else end
        yield Piece(text[start:end], opens=start == 0)
        start = end


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
