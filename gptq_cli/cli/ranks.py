"""What the command line does where torchrun started several processes: the first one talks, the others are
silent.

    torchrun --nproc-per-node 2 -m gptq_cli quantize MODEL --out DIR

An error of a rank that follows is told to rank 0, which shows it. It is shown here only where rank 0 cannot
have heard it. A wrong option it finds by itself; then the launcher ends this process before it speaks.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from socket import gethostname
from typing import Annotated

from gptq_cli.cli.failure import INTERRUPTED
from gptq_cli.cli.options import RUN, option
from gptq_cli.cli.output import Session
from gptq_cli.errors import UsageError
from gptq_cli.ranks.launch import place_of

Processes = Annotated[
    int | None,
    option(
        "--processes",
        "Plan for so many processes that torchrun starts: memory of each, time, traffic. With --dry-run.",
        RUN,
        "N",
    ),
]


PATIENCE_SECONDS = 3.0
"""Until a launcher has ended the ranks whose first one failed."""


def follows(environ: Mapping[str, str], words: Sequence[str]) -> bool:
    """Whether this process is one of several that quantize, and not the first."""
    return words[:1] == ("quantize",) and place_of(environ) > 0


def followed(session: Session, run: Callable[[Session], int]) -> int:
    """Run the command of a rank that follows, and return its exit code."""
    said, stderr = io.StringIO(), sys.stderr
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        code = run(session)
    if code == UsageError.exit_code and not session.came:
        if "RANK" not in os.environ:  # the others stumble over the same
            return code
        time.sleep(PATIENCE_SECONDS)
    if stderr is not None and code not in (0, INTERRUPTED) and not session.came:
        for line in said.getvalue().splitlines():
            stderr.write(f"rank {os.environ.get('RANK')} on {gethostname()}: {line}\n")
    return left(session, code)


def tell_launcher(environ: Mapping[str, str], message: str) -> None:
    """Leave word of an error where torchrun looks for it: it is in the summary that torchrun ends with, which
    else says "to enable traceback". The form is that of `torch.distributed.elastic`."""
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(told), encoding="utf-8")


def left(session: Session, code: int) -> int:
    """`code`, how the command ended. Where ranks had met and one of them failed, others may never answer: the
    process ends here then, because the interpreter would wait for what is open between them."""
    if session.joined and code:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    return code
