"""Bytes of the sums that a process of a launch keeps beside a moment until all ranks add up.

With P = numbers of a moment as it travels (the lower block triangle of an H; all of a cross moment), each in
fp32, and n = nodes that a rank ends with (`ranks.tree.nodes_of`):

    collecting  most_kept · ΣP + max P: the trees of all moments, log2(16 / ranks) + 1 sums each at most,
                and the pieces of the one that is taken
    exchanging  n · (ΣP - max P) + e · max P: the nodes of the other moments, and of the largest the most of
                2 n                  its nodes and what is sent
                n + c                what is sent and what comes: as many nodes as ranks send on average, c
                c + 2 + 1 / ranks    what came, the own part of the sum, all parts, and the whole

Of c experts that are collected side by side, and the sum of all of them (`engine.leaf_sums.OwnedSums`):

    collecting  as above, of c + 1 moments
    exchanging  n · (c + 1) · P, and (n + received + 2) · P: of as many experts as there are ranks a piece
                each that is sent and that comes, what is summed of one, and the pieces of the sum of all

Without a launcher nothing is kept. Where the backend knows no accelerator (gloo) what travels lies in main
memory for a moment; it is counted on the device all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gptq_cli.ranks.leaves import leaf_count, part_of
from gptq_cli.ranks.tree import most_kept, nodes_of

TRIANGLE = 0.5625
"""The lower block triangle of H in eight block rows, over K²."""


@dataclass(frozen=True, slots=True)
class LeafSumBytes:
    """Beside the moments themselves, at the highest moment of each."""

    collecting: int = 0
    exchanging: int = 0


def leaf_sum_bytes(ranks: int, moments: Sequence[float], rank: int | None = None) -> LeafSumBytes:
    """`moments`: the bytes that each of them travels with. `ranks`: 0 without a launcher; `rank`: that of one
    of them, else of the one that keeps most."""
    if not ranks or not moments:
        return LeafSumBytes()
    kept, nodes, received = _counts(ranks, rank)
    every, largest = sum(moments), max(moments)
    highest = max(2 * nodes, nodes + received, received + 2 + 1 / ranks)
    return LeafSumBytes(
        collecting=math.ceil(kept * every + largest),
        exchanging=math.ceil(nodes * (every - largest) + highest * largest),
    )


def expert_sum_bytes(ranks: int, moment: float, count: int, rank: int | None = None) -> LeafSumBytes:
    """Of `count` experts whose H travels with `moment` bytes."""
    if not ranks:
        return LeafSumBytes()
    every = [moment] * (count + 1)
    _, nodes, received = _counts(ranks, rank)
    exchanging = math.ceil((nodes * (count + 1) + nodes + received + 2) * moment)
    pooled = leaf_sum_bytes(ranks, every, rank)
    return LeafSumBytes(pooled.collecting, max(exchanging, pooled.exchanging))


@lru_cache
def _counts(ranks: int, rank: int | None) -> tuple[int, int, float]:
    """Sums that `rank` (None: the busiest) keeps, nodes that it ends with, and nodes that a rank has on
    average."""
    parts = [part_of(leaf_count(ranks), number, ranks) for number in range(ranks)]
    nodes = [len(nodes_of(part)) for part in parts]
    own = range(ranks) if rank is None else (rank,)
    return max(most_kept(parts[n]) for n in own), max(nodes[n] for n in own), sum(nodes) / ranks
