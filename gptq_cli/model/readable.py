"""Whether the small files beside a model can be read, found out before the run instead of at its end.

Of settings it is found out whether they are JSON, too: a checkpoint that they are copied into would not be
opened, or be opened without them. What a tokenizer is made of is tried by opening it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from gptq_cli.model.source import SourceProblem, read_json
from gptq_cli.model.source_files import COPIED, COPIED_FOLDERS, is_pointer, oversize

_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def unreadable_files(source: Path, *, code: bool) -> tuple[SourceProblem, ...]:
    """A problem for every side file that would be copied but cannot be opened, or holds broken settings."""
    return (*_problems(source, code), *broken_settings(source))


def broken_settings(directory: Path) -> Iterator[SourceProblem]:
    """A problem for every file of settings beside the weights that is not a JSON object. What cannot be
    opened, was not fetched or is too large is left out: it is reported as that."""
    names = sorted(entry.name for entry in os.scandir(directory))
    for name in (name for name in names if any(fnmatch(name, pattern) for pattern in _SETTINGS)):
        path = directory / name
        if not path.is_file() or is_pointer(path) or oversize(directory, name) is not None:
            continue
        try:
            fault = "" if isinstance(read_json(path), dict) else f"{name} is not a JSON object"
        except ValueError as error:
            fault = str(error)
        except OSError:
            continue
        if fault:
            hint = "fetch the file again, or take it out of the directory"
            yield SourceProblem("broken-settings", name, fault, hint)


def _problems(source: Path, code: bool) -> Iterator[SourceProblem]:
    patterns = (*COPIED, "*.py") if code else COPIED
    names = [entry.name for entry in os.scandir(source) if any(fnmatch(entry.name, p) for p in patterns)]
    for folder in (name for name in COPIED_FOLDERS if os.path.isdir(source / name)):
        try:
            inner = [entry.name for entry in os.scandir(source / folder)]
            names += [f"{folder}/{name}" for name in inner if fnmatch(name, "*.jinja")]
        except OSError as error:
            yield _problem(source, folder, error)
    for name in sorted(names):
        path = source / name
        try:
            if path.is_file():
                os.close(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
        except OSError as error:
            yield _problem(source, name, error)


def _problem(source: Path, name: str, error: OSError) -> SourceProblem:
    return SourceProblem(
        "unreadable-file",
        name,
        f"{name} would be copied into the checkpoint, but cannot be read: {error.strerror}",
        f"make it readable (chmod u+r {shlex.quote(str(source / name))}), or take it out of the directory",
    )
