"""The file that an HTML page is written to: checked before the work, written after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gptq_cli.errors import ConfigError, GptqError
from gptq_cli.events import Observer, Warned
from gptq_cli.files import kind_of, open_once, reason, shown

HTML_BEGINS = b"<!doctype html"
T = TypeVar("T", bound=Any)  # a report with warnings


def check_page(option: str, path: Path) -> None:
    """Raise `ConfigError` where no file can be written, or one that is no page would be lost.

    Before the work, not after it.
    """
    elsewhere = f"give --{option} a file in a directory that you can write to"
    try:
        kinds = (kind_of(path), kind_of(path.parent))
        other = kinds[0] == "file" and not _is_page(path)
    except OSError as error:
        raise ConfigError(
            f"{option} is {shown(path)!r}, which cannot be written: {reason(error)}", hint=elsewhere
        ) from error
    if kinds[0] == "directory":
        raise ConfigError(
            f"{option} is {str(path)!r}, which is a directory", hint=f"--{option} {path / 'run.html'}"
        )
    if kinds[1] != "directory" or not os.access(path if kinds[0] else path.parent, os.W_OK):
        raise ConfigError(f"{option} is {str(path)!r}, which cannot be written", hint=elsewhere)
    if other:
        raise ConfigError(
            f"{option} is {str(path)!r}, a file that is no page and would be lost",
            hint=f"give --{option} a new file, or remove that one",
        )


def _is_page(path: Path) -> bool:
    """Whether a file is empty or a page that was written before. Raises `OSError`."""
    with open_once(path) as stream:
        return stream.read(len(HTML_BEGINS)).lower() in (b"", HTML_BEGINS)


def write_page(path: Path, page: str) -> None:
    """Write a page. Raises `GptqError`."""
    try:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
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
