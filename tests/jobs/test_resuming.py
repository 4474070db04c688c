"""What is said of the work that a working folder holds."""

from __future__ import annotations

import pytest

from gptq_cli.checkpoint.fingerprint import Fingerprint
from gptq_cli.checkpoint.journal import Manifest, Part
from gptq_cli.jobs.resuming import work_words


@pytest.mark.parametrize(
    ("done", "total", "words"),
    [
        (0, 1, "the gradients for the one block from "),
        (1, 1, "the one block from "),
        (0, 3, "the gradients for all 3 blocks from "),
        (1, 3, "block 0 of 3 from "),
        (2, 3, "blocks 0 to 1 of 3 from "),
        (3, 3, "all 3 blocks from "),
    ],
)
def test_the_blocks_that_are_kept(done: int, total: int, words: str) -> None:
    parts = tuple(Part(f"{number}", 1, "") for number in range(done))
    manifest = Manifest(fingerprint=Fingerprint(()), total=total, starts=(), blocks=parts)
    assert work_words(manifest).startswith(words)
