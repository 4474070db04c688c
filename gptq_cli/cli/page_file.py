"""The file that an HTML page is written to: checked before the work, written after it."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from gptq_cli.errors import ConfigError, GptqError
from gptq_cli.events import Observer, Warned
from gptq_cli.files import expanded, kind_of, open_once, reason, shown

HTML_BEGINS = b"<!doctype html"
_PAGES = (".html", ".htm")
T = TypeVar("T", bound=Any)  # a report with warnings


def check_page(
    option: str,
    text: str,
    others: Mapping[str, str | None] = MappingProxyType({}),
    *,
    out: str | None = None,
) -> Path:
    """The file that `--option` names. Raises `ConfigError` where none can be written, or one that is no page
    would be lost.

    Before the work, not after it. `others`: options of the same command, and what they write to. `out`: the
    directory that the work will put in place, which may hold the page.
    """
    path = expanded(text)
    if out and path.name and not text.endswith(os.sep) and _is_in(path, out):
        if path.suffix.lower() not in _PAGES:
            raise ConfigError(
                f"{option} is {shown(text)!r}, a page in out, where other files may have such a name; "
                f"allowed there: names with {' or '.join(_PAGES)}",
                hint=f"--{option} {shlex.quote(str(path.with_suffix(_PAGES[0])))}",
            )
        if not os.path.lexists(expanded(out)):
            return path
    elsewhere = f"give --{option} a file in a directory that you can write to"
    try:
        kind = kind_of(path)
        if kind == "directory" or (kind is None and text.endswith(os.sep)):
            raise ConfigError(
                f"{option} is {shown(text)!r}, which is a directory", hint=f"--{option} {path / 'run.html'}"
            )
        _try_to_write(path, kind)
        other = kind == "file" and not _is_page(path)
    except OSError as error:
        raise ConfigError(
            f"{option} is {shown(text)!r}, which cannot be written: {reason(error)}", hint=elsewhere
        ) from error
    if other:
        raise ConfigError(
            f"{option} is {shown(text)!r}, a file that is not a page and would be lost",
            hint=f"give --{option} a new file, or remove that one",
        )
    for name, held in others.items():
        _check_apart(option, path, name, held)
    return path


def _is_in(path: Path, directory: str) -> bool:
    """Whether a file is, or will be, right in a directory."""
    if "\0" in f"{path}{directory}":
        return False
    return os.path.realpath(path.parent) == os.path.realpath(expanded(directory))


def _try_to_write(path: Path, kind: str | None) -> None:
    """Raise the `OSError` that writing will raise; what is there stays as it is."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a name cannot hold a NUL character")
    if kind is None:  # opened for real: rights alone do not tell of a sealed or full file system
        target = os.path.realpath(path)  # of a link to nothing, what it leads to
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.unlink(target)
    elif kind == "file":
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
    elif not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _check_apart(option: str, path: Path, name: str, held: str | None) -> None:
    if not held or "\0" in held:
        return
    page, other = (Path(os.path.realpath(one)) for one in (path, expanded(held)))
    if page == other:
        raise ConfigError(
            f"{option} and {name} are both {shown(held)!r}", hint=f"give --{option} a file of its own"
        )
    if page in other.parents:
        raise ConfigError(
            f"{option} is {shown(path)!r}, where {name} ({shown(held)}) needs a directory",
            hint=f"give --{option} a file of its own",
        )


def _is_page(path: Path) -> bool:
    """Whether a file is empty or a page that was written before. Raises `OSError`."""
    with open_once(path) as stream:
        return stream.read(len(HTML_BEGINS)).lower() in (b"", HTML_BEGINS)


def write_page(path: Path, page: str) -> None:
    """Write a page. Raises `GptqError`; a file that was not there before is not there then."""
    new = False
    try:
        new = kind_of(path) is None
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        if new:
            with suppress(OSError):
                os.unlink(os.path.realpath(path))
        raise GptqError(f"the page {path} was not written: {reason(error)}") from error


def with_page(path: Path, result: T, page_of: Callable[[T], str], observer: Observer, otherwise: str) -> T:
    """The result after its page was written: where it could not be, with one more warning. The work is done,
    and that is no failure of it."""
    try:
        write_page(path, page_of(result))
    except GptqError as error:
        warned = Warned(error.message, otherwise)
        observer(warned)
        return replace(result, warnings=(*result.warnings, warned.message))
    return result
