"""Whether the small files beside a model can be read, found out before the run instead of at its end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from gptq_cli.model.source import SourceProblem
from gptq_cli.model.source_files import COPIED, COPIED_FOLDERS


def unreadable_files(source: Path, *, code: bool) -> tuple[SourceProblem, ...]:
    """A problem for every side file that would be copied but cannot be opened; contents are not read."""
    return tuple(_problems(source, code))


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
