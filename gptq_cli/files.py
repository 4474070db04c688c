"""Files that a person names: what stands at a path, and opening it once without waiting for ever.

A path comes from a command line, a preset or a program, so it may be anything: too long, a directory that
nobody may enter, a named pipe without a writer, a device. Each ends in an `OSError` with a reason in words;
whoever asked turns it into an error that names the option.
"""

from __future__ import annotations

import errno
import io
import os
import shlex
import stat
import time
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

Kind = Literal["file", "directory", "pipe", "device"]

WRITER_SECONDS = 5.0
"""How long a pipe may be without a writer before it is given up."""
_LOOK_AGAIN_SECONDS = 0.05
_SHOWN_CHARACTERS = 200
_FIRST_BYTES = 1 << 16


def expanded(text: str) -> Path:
    """The path with `~` and `~user` replaced; a user that does not exist leaves it as it stands."""
    return Path(os.path.expanduser(text))


def reason(error: OSError | ValueError) -> str:
    """Why, in lower case and without the path: `permission denied`."""
    words = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return words if words[:2].isupper() else words[:1].lower() + words[1:]


def unreadable(what: str, path: Path, error: OSError) -> tuple[str, str]:
    """What is said of a file that exists but cannot be read, and what helps; "" where that is not known."""
    hint = f"make it readable: chmod u+r {shlex.quote(str(path))}" if error.errno == errno.EACCES else ""
    return f"{what} cannot be read: {reason(error)}", hint


def shown(path: object) -> str:
    """A path for a message: an endless one is cut in the middle."""
    text = str(path)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}…{text[-half:]} ({len(text)} characters)"


def kind_of(path: Path) -> Kind | None:
    """What stands at `path`, None for nothing. Raises `OSError` where even that cannot be known."""
    try:
        return _kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL, which no name holds
        return None


def open_once(path: Path, *, writer_seconds: float = WRITER_SECONDS) -> BinaryIO:
    """A file or a pipe (a FIFO, `<(…)`, /dev/stdin), to be read once from its beginning.

    Raises `OSError`: all that `open` raises, and for a directory, a device, a pipe that nobody writes to.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)  # non-blocking: a FIFO without a writer would hold us here
    except ValueError as error:
        raise OSError(errno.EINVAL, "a name cannot hold a NUL character", str(path)) from error
    try:
        kind = _kind(os.fstat(descriptor).st_mode)
        if kind in ("directory", "device"):
            raise OSError(errno.EINVAL, f"it is a {kind}; allowed: a file or a pipe", str(path))
        first = _first_bytes(descriptor, path, writer_seconds) if kind == "pipe" else b""
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    if kind == "file":
        return os.fdopen(descriptor, "rb")
    return io.BufferedReader(cast(io.RawIOBase, _Pipe(descriptor, first)))


def _kind(mode: int) -> Kind:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "pipe" if stat.S_ISFIFO(mode) else "device"


def _first_bytes(descriptor: int, path: Path, writer_seconds: float) -> bytes:
    """What a pipe holds now, b"" where its writer is silent yet. `OSError` without one."""
    deadline = time.monotonic() + writer_seconds
    while True:
        try:
            first = os.read(descriptor, _FIRST_BYTES)
        except BlockingIOError:
            return b""
        if first:
            return first
        if time.monotonic() >= deadline:
            raise OSError(
                errno.EPIPE, f"nothing was written to the pipe within {writer_seconds:g} s", str(path)
            )
        time.sleep(_LOOK_AGAIN_SECONDS)


class _Pipe(io.RawIOBase):
    """The bytes that were read already, then the rest of the pipe."""

    def __init__(self, descriptor: int, first: bytes) -> None:
        self._rest = io.FileIO(descriptor)
        self._first = memoryview(first)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self._first:
            return self._rest.readinto(buffer)
        room = memoryview(buffer).cast("B")
        taken = self._first[: len(room)]
        room[: len(taken)] = taken
        self._first = self._first[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._rest.close()
        super().close()
