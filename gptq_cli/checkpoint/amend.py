"""Writing small files of a finished checkpoint anew: each is complete in its old form or in its new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from gptq_cli.checkpoint.renames import fsync


def amend(directory: Path, texts: Mapping[str, str]) -> None:
    """Write `texts` (by name) into `directory`. Raises `OSError`; no other file is touched."""
    for name, text in texts.items():
        new = directory / f".{name}.{secrets.token_hex(4)}"
        try:
            new.write_text(text, encoding="utf-8")
            fsync(new)
            os.replace(new, directory / name)
        finally:
            new.unlink(missing_ok=True)
    fsync(directory)
