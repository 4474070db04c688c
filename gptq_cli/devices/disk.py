"""How fast the files of a model can be read: some pieces of them are.

They are read as a run reads them. Where the system still has them in memory, that is as fast as it will be
then; and places are drawn by lot, because a piece that a probe has read is in memory for the next probe.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

PIECE_BYTES = 4 << 20
"""Large enough for the way to its place not to count."""
_PIECES = 8
LEAST_BYTES = 8 * _PIECES * PIECE_BYTES
"""Files of less are read in a moment, whatever the disk."""


def read_rate(files: Sequence[Path]) -> float | None:
    """Bytes per second from `files`, of 32 MiB in all. None where they are small, or cannot be read."""
    try:
        sizes = [file.stat().st_size for file in files]
        if sum(sizes) < LEAST_BYTES:
            return None
        lots = random.Random()
        begun, found = perf_counter(), 0
        for file in lots.choices(files, weights=sizes, k=_PIECES):
            found += _read_piece(file, lots)
        return found / max(1e-9, perf_counter() - begun)
    except OSError:  # what cannot be read is refused by those who need it
        return None


def _read_piece(file: Path, lots: random.Random) -> int:
    with file.open("rb", buffering=0) as opened:
        opened.seek(lots.randrange(max(1, file.stat().st_size - PIECE_BYTES)))
        return len(opened.read(PIECE_BYTES))
