"""UTF-8 text from files and pipes, in bounded steps; other formats are recognised by their first bytes.

Line ends become "\\n" and a byte order mark is dropped. Whatever cannot be read is a `CalibrationError` that
names the line and the byte.
"""

from __future__ import annotations

import codecs
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gptq_cli.errors import CalibrationError
from gptq_cli.files import open_once, reason, shown

SOURCES_HINT = "use --calibration pydoc (needs no file), or a .txt, .jsonl, .json or .parquet file, or '-'"

STANDARD_INPUT = "standard input"
CHUNK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 28
"""Of one line of a .jsonl file, which can only be understood as a whole."""

_UTF_16 = "convert it: iconv -f UTF-16 -t UTF-8 {name} > utf8.txt"
_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "unpack it first: gzip -dk {name}"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it first: zstd -d {name}"),
    (b"\xfd7zXZ\x00", "xz", "unpack it first: xz -dk {name}"),
    (b"BZh", "bzip2", "unpack it first: bzip2 -dk {name}"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", "unpack it first: 7z x {name}"),
    (b"PK\x03\x04", "zip", "unpack it first: unzip {name}"),
    (b"PAR1", "Parquet", "name it FILE.parquet"),
    (b"ARROW1", "Arrow", "write it as .parquet or .jsonl: datasets.Dataset.from_file(…).to_parquet(…)"),
    (b"%PDF-", "PDF", "take the text out of it first: pdftotext {name}"),
    (b"\xff\xfe", "UTF-16", _UTF_16),
    (b"\xfe\xff", "UTF-16", _UTF_16),
)
"""First bytes, the name of the format, what to do."""
PACKED = (".gz", ".zst", ".xz", ".bz2", ".7z", ".zip", ".tar", ".tgz")
"""Suffixes of archives; no data set on the Hub has one in its name."""
_HEAD_BYTES = 4096


def opened(path: Path) -> BinaryIO:
    """A file or pipe to be read once. Raises `CalibrationError`."""
    try:
        return open_once(path)
    except OSError as error:
        raise CalibrationError(f"cannot read {shown(path)}: {reason(error)}", hint=SOURCES_HINT) from error


def refuse_other_formats(head: bytes, name: str) -> None:
    """Raise where a file's first bytes are those of an archive, a table or UTF-16 rather than of text."""
    for magic, kind, hint in _FORMATS:
        if head.startswith(magic):
            raise CalibrationError(f"{name} is {kind}, not UTF-8 text", hint=hint.format(name=_word(name)))
    at = head.find(b"\0", 0, _HEAD_BYTES)
    if at >= 0:
        raise CalibrationError(
            f"{name} is not text: byte {at} of the file is 0x00",
            hint=f"if it is UTF-16, {_UTF_16.format(name=_word(name))}",
        )


def chunks(stream: BinaryIO, name: str) -> Iterator[str]:
    """The text in steps of at most `CHUNK_BYTES` bytes, regardless of lines."""
    position = 0
    line = 1
    rest = b""
    held = ""  # a carriage return whose line feed may be in the next chunk
    while True:
        chunk = _read(stream, name)
        if position == 0 and not rest:
            refuse_other_formats(chunk, name)
        data = rest + chunk
        try:
            text, used = codecs.utf_8_decode(data, "strict", not chunk)
        except UnicodeDecodeError as error:
            at = line + data.count(b"\n", 0, error.start)
            raise _not_utf8(name, data[error.start], at, position + error.start) from error
        line += data.count(b"\n", 0, used)
        if position == 0:
            text = text.removeprefix("\ufeff")
        position, rest = position + used, data[used:]
        text = held + text
        held = "\r" if chunk and text.endswith("\r") else ""
        text = text.removesuffix(held).replace("\r\n", "\n")
        if text:
            yield text
        if not chunk:
            return


def lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) of at most `MAX_ROW_BYTES` bytes."""
    position = 0
    number = 0
    while raw := _read(stream, name, line=True):
        number += 1
        if number == 1:
            refuse_other_formats(raw, name)
        if len(raw) > MAX_ROW_BYTES:
            raise CalibrationError(
                f"{name} line {number} has more than {MAX_ROW_BYTES} bytes, too many for a table's row",
                hint="plain text belongs in a .txt file; a JSON list belongs in a .json file",
            )
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(name, raw[error.start], number, position + error.start) from error
        if number == 1:
            text = text.removeprefix("\ufeff")
        yield number, f"{text[:-2]}\n" if text.endswith("\r\n") else text
        position += len(raw)


def _read(stream: BinaryIO, name: str, *, line: bool = False) -> bytes:
    try:
        return stream.readline(MAX_ROW_BYTES + 1) if line else stream.read(CHUNK_BYTES)
    except (OSError, ValueError) as error:  # ValueError: the stream was closed
        raise CalibrationError(f"cannot read {name}: {reason(error)}", hint=SOURCES_HINT) from error


def _not_utf8(name: str, byte: int, line: int, position: int) -> CalibrationError:
    return CalibrationError(
        f"{name} is not UTF-8: byte 0x{byte:02x} at line {line}, byte {position} of the file",
        hint=f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {_word(name)} > utf8.txt",
    )


def _word(name: str) -> str:
    """A file's name for a command line; standard input has none."""
    return "FILE" if name == STANDARD_INPUT else shlex.quote(name)
