"""Tables of text: the rows of JSON lines, JSON and Parquet files, and the text of one row.

A row holds text, or a conversation: a list of messages with a role and a content. The content is text or a
list of parts (`[{"type": "text", "text": …}]`), which are joined. Anything that is not text (an image, a
number) is refused, naming its row: a model should not be calibrated on Python's spelling of it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptq_cli.calibration.utf8 import SOURCES_HINT, chunks, lines, opened, refuse_other_formats
from gptq_cli.errors import CalibrationError
from gptq_cli.wording import first_line, json_fault

STANDARD_COLUMNS = ("text", "messages")
TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Values of `type` for a part of a content that is text."""

ANSWERING = ("assistant", "model")
"""Roles whose messages are answers."""
MAX_JSON_CHARACTERS = 1 << 30
_PARQUET_ROWS = 16
"""Rows that are decoded at once: a row may hold a book."""
_COLUMNS_NAMED = 20
_SURROGATE = re.compile("[\ud800-\udfff]")

Render = Callable[[Any], str]
"""A conversation (a list of messages) -> text. May raise anything: a template is the model author's code."""

Row = tuple[str, Any]
"""The row's place, for messages ("line 3"), and its value: an object, a string, anything."""


def json_lines(path: Path, column: str | None) -> Iterator[Row]:
    """The rows of a .jsonl file. Raises `CalibrationError` while iterating."""
    hint = "every line of a .jsonl file is one JSON object; plain text belongs in a .txt file"
    with opened(path) as stream:
        for number, line in lines(stream, str(path)):
            if line.strip():
                yield f"line {number}", _parsed(line.rstrip("\n"), f"{path} line {number}", hint)


def json_rows(path: Path, column: str | None) -> Iterator[Row]:
    """The items of a .json file, which is read as a whole. Raises `CalibrationError` while iterating."""
    parts: list[str] = []
    size = 0
    with opened(path) as stream:
        for chunk in chunks(stream, str(path)):
            parts.append(chunk)
            size += len(chunk)
            if size > MAX_JSON_CHARACTERS:
                raise CalibrationError(
                    f"{path} has more than {MAX_JSON_CHARACTERS} characters, and JSON is read as a whole",
                    hint=f"write one row per line: jq -c '.[]' {path.name} > {path.stem}.jsonl",
                )
    value = _parsed("".join(parts), str(path), None)
    if not isinstance(value, list):
        raise CalibrationError(
            f"{path} holds {kind(value)}; allowed: a list of objects or of strings",
            hint="one object per line is the .jsonl format",
        )
    for number, row in enumerate(value, start=1):
        yield f"item {number}", row


def parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    """The rows of one column of a .parquet file. Raises `CalibrationError` while iterating."""
    import pyarrow
    import pyarrow.parquet

    with opened(path) as stream:
        if not stream.seekable():
            raise CalibrationError(f"{path} is a pipe, and Parquet is read from its end", hint="give a file")
        head = stream.read(4)
        if head != b"PAR1":
            refuse_other_formats(head, str(path))
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if not names:
            return
        wanted = known_column(column or default_column(names), names, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[wanted]):
            for cell in batch.column(0):
                number += 1
                try:
                    yield f"row {number}", {wanted: cell.as_py()}
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    raise CalibrationError(
                        f"{path} row {number} is not UTF-8: 0x{byte:02x} at byte {error.start} of its text",
                        hint="write the column again from text that is decoded",
                    ) from error
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        why = first_line(error)
        raise CalibrationError(f"{path} is not a readable Parquet file: {why}", hint=SOURCES_HINT) from error


def default_column(names: Collection[str]) -> str | None:
    """The column that is read where none is named; None where there is none of `STANDARD_COLUMNS`."""
    return next((name for name in STANDARD_COLUMNS if name in names), None)


def known_column(column: str | None, names: list[Any], place: str) -> str:
    """`column`, if it is one of `names`. Raises `CalibrationError`."""
    if column is None or column not in names:
        more = ", …" if len(names) > _COLUMNS_NAMED else ""
        listed = ", ".join(str(name)[:80] for name in names[:_COLUMNS_NAMED]) or "none"
        missing = "no column 'text' or 'messages'" if column is None else f"no column {column!r}"
        raise CalibrationError(
            f"{place} has {missing}; columns: {listed}{more}",
            hint="name the column after a colon: FILE:COLUMN",
        )
    return column


def row_text(value: Any, place: str, render: Render | None) -> str:
    """The text of one cell; "" for none. `render` turns a conversation into text (None: contents in turn).

    Raises `CalibrationError` naming `place`.
    """
    if value is None or value == []:
        return ""
    if isinstance(value, str):
        return _whole_characters(value, place)
    if not (isinstance(value, list) and all(isinstance(item, Mapping) for item in value)):
        raise CalibrationError(
            f"{place} is {kind(value)}; allowed: text, or a list of messages with a role and a content"
        )
    messages = messages_of(value, place)
    if render is None:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return _whole_characters(render(messages), place)
    except (CalibrationError, MemoryError):
        raise
    except Exception as error:  # a chat template is code of the model's author
        raise CalibrationError(
            f"{place}: the model's chat template refuses the conversation: {error}",
            hint="name a column of plain text after a colon: FILE:COLUMN",
        ) from error


def messages_of(value: list[Any], place: str) -> list[dict[str, Any]]:
    """The messages of a conversation, their contents as text. Raises `CalibrationError` naming `place`."""
    return [_message(item, f"{place}: message {number}") for number, item in enumerate(value, start=1)]


def has_answer(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a model says something in the conversation."""
    return any(message["role"] in ANSWERING and str(message["content"]).strip() for message in messages)


def kind(value: Any) -> str:
    """What `value` is, with its article: a kind of JSON, or of a Parquet column that JSON does not have."""
    if value is None:
        return "a JSON null"
    if isinstance(value, bytes):
        return "bytes without a character encoding"
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    name = names.get(type(value))
    return f"a JSON {name}" if name else f"a value of type {type(value).__name__}"


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message with its content as text. One without (a call of a tool) has an empty one."""
    if not isinstance(message.get("role"), str):
        found = f"role {message['role']!r:.80}" if message.get("role") is not None else "no role"
        raise CalibrationError(
            f"{place} has {found}; allowed: a text such as 'user' or 'assistant'",
            hint='a message is {"role": …, "content": …}; other names (from, value) have to be changed',
        )
    return {**message, "content": _content(message.get("content"), place)}


def _content(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        parts = enumerate(content, start=1)
        return "".join(_part(part, f"{place}, part {number} of its content") for number, part in parts)
    if not isinstance(content, str):
        raise CalibrationError(
            f"{place} has {kind(content)} as content; allowed: text, or a list of parts of text"
        )
    return _whole_characters(content, place)


def _part(part: Any, place: str) -> str:
    """The text of a part of a content: a string, or `{"type": "text", "text": …}`."""
    if isinstance(part, str):
        return _whole_characters(part, place)
    if not isinstance(part, Mapping):
        raise CalibrationError(f"{place} is {kind(part)}; allowed: text")
    text, named = part.get("text"), part.get("type")
    others = [str(key) for key, held in part.items() if held is not None and key not in ("text", "type")]
    if isinstance(text, str) and named in TEXT_PARTS and (named is not None or not others):
        return _whole_characters(text, place)
    what = named if isinstance(named, str) else ", ".join(others) or "empty"
    raise CalibrationError(
        f'{place} is not text ({what[:80]}); allowed: {{"type": "text", "text": …}}',
        hint="leave such rows out, or name a column of plain text after a colon: FILE:COLUMN",
    )


def _whole_characters(text: str, place: str) -> str:
    """`text`, if it can be encoded as UTF-8. JSON can hold half a character, which no tokenizer reads."""
    found = _SURROGATE.search(text)
    if found is not None:
        raise CalibrationError(
            f"{place} holds half a surrogate pair (\\u{ord(found[0]):04x}) at character {found.start() + 1}",
            hint="the text was cut inside a character: take the half out, or leave the row out",
        )
    return text


def _parsed(text: str, place: str, hint: str | None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        if "\n" in text.rstrip("\n"):
            where = f"at line {error.lineno}, column {error.colno}"
            if error.msg == "Extra data":
                hint = "one JSON object per line is the .jsonl format: rename the file"
        else:
            where = f"at column {error.colno}: {text.strip()[:60]!r}"
        raise CalibrationError(
            f"{place} is not valid JSON: {json_fault(error)} {where}", hint=hint
        ) from error
    except RecursionError as error:
        raise CalibrationError(
            f"{place} is nested too deeply to be read", hint="leave it out: it is not text"
        ) from error
    except ValueError as error:  # a number of thousands of digits, a repeated key
        why = "it holds a number that is too long" if "digits" in str(error) else str(error)
        raise CalibrationError(f"{place} cannot be read: {why}", hint="correct it or take it out") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"key {twice[:80]!r} appears twice")
    return found
