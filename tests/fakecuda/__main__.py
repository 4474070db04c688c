"""`python -m tests.fakecuda [pytest options and files]`: the accelerator tests, in a pytest of their own.

What `make test-fake` does. Where there can be no make-believe CUDA it says why, in one line, and is content.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tests.fakecuda.build import build, why_not

PLUGIN = ("-p", "tests.fakecuda.plugin", "-m", "gpu and not card")
FOLDERS = ("tests/gpu", "tests/fakecuda")


def main(options: Sequence[str]) -> int:
    """0 where nothing can be run; else this process becomes pytest, so that a signal reaches it."""
    reason = why_not()
    if reason is not None:
        print(f"make-believe CUDA: skipped, {reason}")
        return 0
    build()
    folders = () if any(option.startswith("tests/") for option in options) else FOLDERS
    command = [sys.executable, "-m", "pytest", *PLUGIN, *folders, *options]
    return os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
