"""What the command line does where torchrun started several processes: the first one talks, the others are
silent.

    torchrun --nproc-per-node 2 -m gptq_cli quantize MODEL --out DIR

An error of a rank that follows is told to rank 0, which shows it. It is shown here only where rank 0 cannot
have heard it, and would not find the same by itself, as it does with a wrong option.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from socket import gethostname
from typing import Annotated

from gptq_cli.cli.options import RUN, option
from gptq_cli.cli.output import Session
from gptq_cli.errors import UsageError

Processes = Annotated[
    int | None,
    option(
        "--processes",
        "Plan for so many processes that torchrun starts: memory of each, time, traffic. With --dry-run.",
        RUN,
        "N",
    ),
]


def follows(environ: Mapping[str, str], words: Sequence[str]) -> bool:
    """Whether this process is one of several that quantize, and not the first."""
    several = environ.get("WORLD_SIZE", "1") != "1"
    return words[:1] == ("quantize",) and several and environ.get("RANK", "0") != "0"


def followed(session: Session, run: Callable[[Session], int]) -> int:
    """Run the command of a rank that follows, and return its exit code."""
    said, stderr = io.StringIO(), sys.stderr
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        code = run(session)
    if stderr is not None and not session.joined and code not in (0, UsageError.exit_code):
        for line in said.getvalue().splitlines():
            stderr.write(f"rank {os.environ.get('RANK')} on {gethostname()}: {line}\n")
    return left(session, code)


def left(session: Session, code: int) -> int:
    """`code`, how the command ended. Where ranks had met and one of them failed, others may never answer: the
    process ends here then, because the interpreter would wait for what is open between them."""
    if session.joined and code:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    return code
