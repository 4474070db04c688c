"""How the work is shared out, in plain numbers that every rank computes alike.

**Samples.** The samples of a run, the paired ones first, are cut into a fixed number of *leaves*, contiguous
and of equal cost (a paired sample runs through two models). A rank has a contiguous set of leaves. A
micro-batch lies in one leaf, so that what is summed within a leaf does not depend on the number of ranks, and
the leaves are summed in a fixed tree (`tree.py`): the result is the same for any number of ranks up to
`LEAVES`.

**Rows.** GPTQ never mixes rows. The stacked rows of a stage are cut into one range for each rank, at
multiples of `ROW_STEP`, so that kernels work on whole vectors.

**Factors.** Where there are more ranks than λ to try, those that are left over each make one factor ahead.

**Experts.** Stages that are solved side by side are dealt out in contiguous parts of equal cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

Purpose = TypeVar("Purpose")
LEAVES = 16
"""Leaves of a run of up to so many ranks: enough to share evenly, few enough to keep log2 of them in
memory."""
ROW_STEP = 16
ALIGNED_BYTES = 8
PAIR_COST = 2
"""A paired sample runs through two models, and goes into two moments for each that another one goes into."""


def leaf_count(ranks: int) -> int:
    """`LEAVES`, or the next power of two that has one for every rank."""
    return max(LEAVES, 1 << (ranks - 1).bit_length())


def leaf_of_each(pairs: int, others: int, leaves: int) -> list[int]:
    """The leaf of every sample, the paired ones first: never falls, equal in cost as far as samples allow."""
    costs = [PAIR_COST] * pairs + [1] * others
    total = 2 * sum(costs)
    return [(2 * end - cost) * leaves // total for cost, end in zip(costs, accumulate(costs), strict=True)]


def part_of(count: int, rank: int, ranks: int) -> range:
    """The numbers of 0 … count - 1 that belong to `rank`: contiguous, about as many for each."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def idle_ranks(pairs: int, others: int, ranks: int) -> int:
    """Ranks whose leaves no sample falls into."""
    leaves = leaf_count(ranks)
    taken = set(leaf_of_each(pairs, others, leaves))
    return sum(taken.isdisjoint(part_of(leaves, rank, ranks)) for rank in range(ranks))


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the samples a process works on."""

    batches: list[tuple[int, ...]]
    """The samples of each micro-batch, the paired ones first."""
    paired: int
    """So many micro-batches, the first ones, are run through the dense model too."""
    leaves: tuple[int, ...] = ()
    """The leaf of each micro-batch; () where one process does all the work and nothing is cut."""
    first_pair: int = 0
    """Paired samples before these."""
    pairs: int = 0
    """Paired samples of all ranks."""
    one_start: bool = False
    """All samples, those of other ranks too, begin with the same token."""


def micro_batches(samples: Sequence[int], batch_size: int) -> list[tuple[int, ...]]:
    """`samples` in pieces of `batch_size`; the last may be short."""
    return [tuple(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]


def share_of(
    pairs: Sequence[int], others: Sequence[int], batch_size: int, leaves: int, rank: int, ranks: int
) -> Share:
    """The samples of `rank`: its leaves, each in micro-batches of `batch_size`, pairs and others apart."""
    own = part_of(leaves, rank, ranks)
    found = leaf_of_each(len(pairs), len(others), leaves)
    leaf_batches: list[tuple[int, tuple[int, ...]]] = []
    paired = 0
    for samples, leaf_of in ((pairs, found[: len(pairs)]), (others, found[len(pairs) :])):
        paired = len(leaf_batches)
        for leaf in own:
            inside = [sample for sample, at in zip(samples, leaf_of, strict=True) if at == leaf]
            leaf_batches += [(leaf, batch) for batch in micro_batches(inside, batch_size)]
    return Share(
        batches=[batch for _, batch in leaf_batches],
        paired=paired,
        leaves=tuple(leaf for leaf, _ in leaf_batches),
        first_pair=sum(leaf < own.start for leaf in found[: len(pairs)]),
        pairs=len(pairs),
    )


def row_ranges(rows: int, ranks: int) -> list[range]:
    """The stacked rows of each rank: contiguous, at multiples of `ROW_STEP`; empty where there are few."""
    steps = -(-rows // ROW_STEP)
    parts = (part_of(steps, rank, ranks) for rank in range(ranks))
    return [range(part.start * ROW_STEP, min(part.stop * ROW_STEP, rows)) for part in parts]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one linear of a stage."""

    linear: int
    """Its place in the stage."""
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


def pieces_of(rows: Sequence[int], ranks: int) -> list[list[Piece]]:
    """For each rank the pieces that its range of the stacked rows holds; `rows`: of every linear."""
    ends = list(accumulate(rows))
    return [
        [
            Piece(place, max(span.start, end - own) - (end - own), min(span.stop, end) - (end - own))
            for place, (own, end) in enumerate(zip(rows, ends, strict=True))
            if max(span.start, end - own) < min(span.stop, end)
        ]
        for span in row_ranges(ends[-1] if ends else 0, ranks)
    ]


def padded_bytes(sizes: Sequence[int]) -> int:
    """Bytes that every rank sends where so many belong to each: the most, rounded up so that parts of what is
    received can be seen as numbers of any dtype."""
    return -(-max(sizes) // ALIGNED_BYTES) * ALIGNED_BYTES


def made_ahead(purposes: Sequence[Purpose], tried: int, ranks: int) -> dict[int, Purpose]:
    """The rank that makes a factor for each purpose, of the ranks that do not try one of so many λ."""
    return dict(zip(range(tried, ranks), purposes, strict=False))


def dealt(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that does each piece of work: contiguous parts of about equal cost."""
    total = sum(costs) or 1.0
    middles = (end - cost / 2 for cost, end in zip(costs, accumulate(costs), strict=True))
    return [min(ranks - 1, int(middle * ranks / total)) for middle in middles]
