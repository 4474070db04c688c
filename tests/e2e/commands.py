"""Running the real commands in this process, and the text they calibrate on."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_cli.cli.app import main
from gptq_cli.cli.failure import INTERRUPTED
from tests.documents import checked_document

FAST = ("--samples", "8", "--seq-len", "48", "--group-size", "32", "--progress", "none")


@dataclass(frozen=True)
class Ran:
    """What a command left on its streams."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """stdout of a command with --json: exactly one document, as its schema says."""
        return checked_document(self.stdout)


def gptq(*words: object, interrupted: bool = False) -> Ran:
    """`gptq words…`, in this process; `interrupted`: the test itself sends a signal."""
    return in_process(main, [str(word) for word in words], interrupted=interrupted)


def in_process(command: Callable[[list[str]], int], words: list[str], *, interrupted: bool = False) -> Ran:
    """`command(words)` with its streams kept.

    `main` turns Ctrl-C into exit code 130. Where the test did not interrupt the command itself
    (`interrupted`), it was the person at the terminal, who wants the test run to end.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = command(words)
    if code == INTERRUPTED and not interrupted:
        raise KeyboardInterrupt
    return Ran(code, out.getvalue(), err.getvalue())


def write_text(path: Path, words: int = 6000) -> Path:
    """A text file with some order in it; the same every time."""
    sentence = "the model reads a block and writes its codes while a group of columns shares one scale"
    vocabulary = sentence.split()
    lines, state = [], 7
    for _ in range(words // 12):
        line = []
        for _ in range(12):
            state = (state * 1103515245 + 12345) % 2**31
            line.append(vocabulary[(state >> 16) % len(vocabulary)])
        lines.append(" ".join(line) + ".")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
