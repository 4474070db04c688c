"""What falls to each rank of a run: samples, rows, experts. Plain numbers, as `ranks.leaves` shares them out.

Where `Work.rank` names no rank, the largest share of any counts: that is what every device must have room
for, since all ranks work by one plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from gptq_cli.planning.cases import Work
from gptq_cli.ranks.leaves import PAIR_COST, dealt, leaf_count, leaf_of_each, part_of, row_ranges


@dataclass(frozen=True, slots=True)
class Samples:
    """Of one rank."""

    pairs: int
    """Samples that run through the dense model as well."""
    others: int

    @property
    def held(self) -> int:
        """Hidden states that are kept, in samples: a pair has two."""
        return PAIR_COST * self.pairs + self.others

    @property
    def all(self) -> int:
        """Samples, whatever they cost."""
        return self.pairs + self.others


def pairs_and_others(work: Work) -> tuple[int, int]:
    """Samples of the whole run."""
    pairs = work.paired_samples
    return pairs, work.calibration.samples - pairs


def samples_of_ranks(work: Work) -> tuple[Samples, ...]:
    """The samples of every rank, in order; of one process all of them."""
    pairs, others = pairs_and_others(work)
    return _samples_of_ranks(pairs, others, max(1, work.ranks))


@lru_cache(maxsize=256)
def _samples_of_ranks(pairs: int, others: int, ranks: int) -> tuple[Samples, ...]:
    leaves = leaf_count(ranks)
    counts = [[0, 0] for _ in range(leaves)]
    for number, leaf in enumerate(leaf_of_each(pairs, others, leaves)):
        counts[leaf][number >= pairs] += 1
    parts = (part_of(leaves, rank, ranks) for rank in range(ranks))
    return tuple(Samples(*(sum(counts[leaf][kind] for leaf in part) for kind in (0, 1))) for part in parts)


def own_samples(work: Work) -> Samples:
    """Those of `work.rank`, or of the rank that holds most."""
    found = samples_of_ranks(work)
    return found[work.rank] if work.rank is not None else max(found, key=lambda one: one.held)


def samples_share(work: Work) -> float:
    """The largest share that a rank has of the forwards, 0 to 1."""
    found = [one.held for one in samples_of_ranks(work)]
    return max(found) / max(1, sum(found))


def most_in_a_leaf(work: Work) -> int:
    """The longest micro-batch that can be: samples of one kind in a leaf; without a launcher all of them."""
    pairs, others = pairs_and_others(work)
    if not work.ranks:
        return pairs + others
    return _most_in_a_leaf(pairs, others, leaf_count(work.ranks))


@lru_cache(maxsize=256)
def _most_in_a_leaf(pairs: int, others: int, leaves: int) -> int:
    leaf_of = leaf_of_each(pairs, others, leaves)
    kinds = (leaf_of[:pairs], leaf_of[pairs:])
    return max((kind.count(leaf) for kind in kinds for leaf in set(kind)), default=1)


def own_rows(work: Work, rows: int) -> int:
    """Of so many stacked rows."""
    return _share(work, lambda ranks: _rows(rows, ranks))


def own_items(work: Work, count: int) -> int:
    """Of so many stages of equal cost that are dealt out."""
    return _share(work, lambda ranks: _items(count, ranks))


def _share(work: Work, of_ranks: Callable[[int], tuple[int, ...]]) -> int:
    found = of_ranks(max(1, work.ranks))
    return found[work.rank] if work.rank is not None else max(found)


@lru_cache(maxsize=1024)
def _rows(rows: int, ranks: int) -> tuple[int, ...]:
    return tuple(len(span) for span in row_ranges(rows, ranks))


@lru_cache(maxsize=1024)
def _items(count: int, ranks: int) -> tuple[int, ...]:
    owners = dealt([1.0] * count, ranks)
    return tuple(owners.count(rank) for rank in range(ranks))
