"""`python -m tests.fakecuda [pytest options and files]`: the accelerator tests, in a pytest of their own.

What `make test-fake` does. Where there can be no make-believe CUDA it says why, in one line, and is content.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from tests.fakecuda.build import build, why_not

PLUGIN = ("-p", "tests.fakecuda.plugin", "-m", "gpu and not card")
FOLDERS = ("tests/gpu", "tests/fakecuda")


def main(options: Sequence[str]) -> int:
    """The exit code: pytest's, or 0 where nothing can be run."""
    reason = why_not()
    if reason is not None:
        print(f"make-believe CUDA: skipped, {reason}")
        return 0
    build()
    folders = () if any(option.startswith("tests/") for option in options) else FOLDERS
    command = [sys.executable, "-m", "pytest", *PLUGIN, *folders, *options]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
