"""What is kept for later runs of the same user: where, and how it is written."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

CACHE_VARIABLE = "GPTQ_CACHE"


def cache_directory() -> Path:
    """Where it is kept: GPTQ_CACHE, or `gptq` in HF_HOME, in XDG_CACHE_HOME, in ~/.cache.

    Raises `OSError` for a home directory that is not known: a user of a container may have none.
    """
    own = os.environ.get(CACHE_VARIABLE)
    above = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own).expanduser() if own else Path(above).expanduser() / "gptq"
    except RuntimeError as error:  # what pathlib raises then
        raise OSError(errno.ENOENT, f"the home directory of {own or above} is not known") from error


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A place beside `path`, in whose folder: what is written there becomes `path` at the end of the `with`,
    and is gone where that fails or is interrupted. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
