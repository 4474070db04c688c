"""The lower block triangle of a (K, K) matrix: what is summed of H, and what travels of H and of its factor.

Block rows rather than single rows, so that each is one matmul and one copy; with eight of them the triangle
has 9/16 of the numbers of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

_BLOCK_ROWS = 8


def block_rows(columns: int) -> Sequence[tuple[int, int]]:
    """(a, b) of each: rows a..b have columns 0..b."""
    step = max(1, -(-columns // _BLOCK_ROWS))
    return [(a, min(a + step, columns)) for a in range(0, columns, step)]


def triangle_numbers(columns: int) -> int:
    """Numbers in all of them."""
    return sum((b - a) * b for a, b in block_rows(columns))
