"""The bytes that leave a rank while a block is worked on: what is counted when it happens, foretold.

With S ranks, and for each moment (see `gptq.moments`) L numbers, of which rank r adds up L_r:

    sums     fp32: its nodes of the tree of leaves (`ranks.tree`), those that a sample fell into, of each the
             part of every other rank, L - L_r; then the sum of its own part to S - 1 others, all parts padded
             to the longest. L is the lower block triangle of an H, and of a cross moment K², or R · K for a
             single linear whose output is added to a residual or that has R at most K / 2
             Of experts: the nodes of each, L, to the rank that solves it; and as above of the sum of a batch
    factors  fp32: the lower block triangle of each that a rank makes ahead (`planning.factors`), counted once
    codes    what `engine.wire` makes of its rows, or experts, padded to the longest of any rank, to S - 1
             others, for each stage and for each batch of experts

Three things are not known before a block is opened. Experts count as if tokens of every leaf reached each; a
single linear as wide as the hidden states is taken to be added to a residual, as it is in decoders; and of
the factors for a step one is taken to be used. Words
that ranks exchange beside that (which nodes there are, α and λ: some kilobytes a block) and snapshots are not
in it: `ranks.channel.Traffic` counts them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from gptq_cli.gptq.triangle import triangle_numbers
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.names import fold
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.factors import factor_plan
from gptq_cli.planning.schedule import block_linears
from gptq_cli.planning.share import pairs_and_others
from gptq_cli.ranks.leaves import dealt, leaf_count, leaf_of_each, padded_bytes, part_of, pieces_of
from gptq_cli.ranks.tree import nodes_of


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that leave one rank while a block is worked on."""

    sum_bytes: int = 0
    code_bytes: int = 0
    factor_bytes: int = 0

    @property
    def shared_bytes(self) -> int:
        """What all ranks send at the same time."""
        return self.sum_bytes + self.code_bytes


def busiest(ranks: Sequence[Traffic]) -> Traffic:
    """Of the rank for which the others wait while all send."""
    return max(ranks, key=lambda one: one.shared_bytes)


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage reduced to what travels."""

    columns: int
    rows: tuple[int, ...]
    """N of each linear."""
    groups: tuple[int, ...]
    """Groups of each."""
    residual: bool
    """It is a single linear as wide as the hidden states."""
    family: str
    """Of experts, see `planning.schedule.StageShape`; else ""."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What of a run decides about traffic."""

    pairs: int
    others: int
    ranks: int
    senders: tuple[int, ...]
    """Of factors."""


def block_traffic(facts: ModelFacts, work: Work, schedule: Schedule) -> dict[str, tuple[Traffic, ...]]:
    """Of every block, what each of `work.ranks` ranks sends. `work`: with a number for the group size."""
    if work.ranks < 2:
        return dict.fromkeys(facts.blocks, (Traffic(),))
    pairs, others = pairs_and_others(work)
    run = _Run(pairs, others, work.ranks, factor_plan(work).senders)
    found = {}
    for name, linears in block_linears(facts).items():
        per_batch = schedule.block(name).experts_per_batch
        stages = _stages_of(linears, facts, work)
        widths = sorted({stage.columns for stage in stages if stage.family})
        found[name] = _traffic(stages, run, tuple((width, per_batch(width)) for width in widths))
    return found


def _stages_of(linears: Sequence[LinearFact], facts: ModelFacts, work: Work) -> tuple[_Stage, ...]:
    by_number: dict[int, list[LinearFact]] = {}
    for linear in linears:
        by_number.setdefault(linear.stage, []).append(linear)
    return tuple(_stage_of(by_number[number], facts.hidden_size, work) for number in sorted(by_number))


def _stage_of(linears: Sequence[LinearFact], hidden: int, work: Work) -> _Stage:
    first, columns = linears[0], linears[0].in_features
    return _Stage(
        columns,
        tuple(linear.out_features for linear in linears),
        tuple(work.quantize.of_linear(linear.name).groups(columns) for linear in linears),
        len(linears) == 1 and first.out_features == hidden,
        fold(first.name) if first.routed else "",
    )


@lru_cache(maxsize=64)
def _traffic(
    stages: tuple[_Stage, ...], run: _Run, experts_per_batch: tuple[tuple[int, int], ...]
) -> tuple[Traffic, ...]:
    """Of every rank. `experts_per_batch`: by K, how many are collected side by side."""
    sums, codes, factors = ([0] * run.ranks for _ in range(3))
    nodes = _nodes_of_ranks(run)
    for batch in _batches(stages, run.ranks, dict(experts_per_batch)):
        length = triangle_numbers(batch.columns)
        for rank, sent in enumerate(_summed_bytes(nodes.every, length)):
            others = sum(owner != rank for owner in batch.owners)
            sums[rank] += sent + 4 * nodes.every[rank] * length * others
    for stage in stages:
        for counts, length in _moments(stage, nodes):
            for rank, sent in enumerate(_summed_bytes(counts, length)):
                sums[rank] += sent
        for rank in run.senders if not stage.family else ():
            factors[rank] += 4 * triangle_numbers(stage.columns)
    for longest in _exchanges(stages, run.ranks, dict(experts_per_batch)):
        for rank in range(run.ranks):
            codes[rank] += (run.ranks - 1) * longest
    return tuple(Traffic(*of_rank) for of_rank in zip(sums, codes, factors, strict=True))


@dataclass(frozen=True, slots=True)
class _Nodes:
    """Of each kind of samples, how many nodes of the tree every rank has to which one of them belongs."""

    all: tuple[int, ...]
    """Of those that go into the first moment: all that are not held out."""
    fit: tuple[int, ...]
    """Pairs that a step is made from."""
    held: tuple[int, ...]
    """Pairs that are held out."""
    every: tuple[int, ...]
    """All samples: those of experts."""


@lru_cache(maxsize=64)
def _nodes_of_ranks(run: _Run) -> _Nodes:
    from gptq_cli.gptq.moments import HELD_OUT_SHARE

    leaves = leaf_count(run.ranks)
    leaf_of = leaf_of_each(run.pairs, run.others, leaves)
    fitted = run.pairs - run.pairs // HELD_OUT_SHARE

    def counts(taken: Sequence[int]) -> tuple[int, ...]:
        there = set(taken)
        return tuple(
            sum(not there.isdisjoint(range(first, first + size)) for first, size in nodes_of(part))
            for part in (part_of(leaves, rank, run.ranks) for rank in range(run.ranks))
        )

    fit, held = leaf_of[:fitted], leaf_of[fitted : run.pairs]
    return _Nodes(counts(fit + leaf_of[run.pairs :]), counts(fit), counts(held), counts(leaf_of))


def _moments(stage: _Stage, nodes: _Nodes) -> Iterator[tuple[tuple[int, ...], int]]:
    """Of each moment that all ranks need, the nodes that every rank has and how many numbers one has."""
    columns, rows = stage.columns, sum(stage.rows)
    if stage.family:
        return
    narrow = stage.residual or (len(stage.rows) == 1 and 2 * rows <= columns)
    cross = columns * (rows if narrow else columns)
    yield nodes.all, triangle_numbers(columns)
    yield nodes.held, triangle_numbers(columns)
    yield nodes.fit, cross
    yield nodes.held, cross


def _summed_bytes(counts: Sequence[int], length: int) -> list[int]:
    """What every rank sends of one moment; see `ranks.group.Ranks.summed`."""
    if not any(counts):
        return [0] * len(counts)
    ranks = len(counts)
    parts = [b - a for a, b in pairwise(length * rank // ranks for rank in range(ranks + 1))]
    shared = 4 * (ranks - 1) * max(parts)
    return [4 * count * (length - own) + shared for count, own in zip(counts, parts, strict=True)]


def _exchanges(stages: Sequence[_Stage], ranks: int, experts_per_batch: dict[int, int]) -> Iterator[int]:
    """The longest share of any rank, in bytes, of every exchange of solved linears."""
    from gptq_cli.engine.wire import Shape, wire_bytes

    for stage in stages:
        if stage.family:
            continue
        of_pieces = (
            [Shape(one.rows, stage.columns, stage.groups[one.linear]) for one in own]
            for own in pieces_of(stage.rows, ranks)
        )
        yield padded_bytes([wire_bytes(shapes) for shapes in of_pieces])
    for batch in _batches(stages, ranks, experts_per_batch):
        of_ranks = [0] * ranks
        for stage, owner in zip(batch.stages, batch.owners, strict=True):
            each = zip(stage.rows, stage.groups, strict=True)
            of_ranks[owner] += wire_bytes([Shape(rows, stage.columns, groups) for rows, groups in each])
        yield padded_bytes(of_ranks)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Experts that are collected side by side."""

    columns: int
    stages: Sequence[_Stage]
    owners: Sequence[int]
    """The rank that solves each."""


def _batches(stages: Sequence[_Stage], ranks: int, experts_per_batch: dict[int, int]) -> Iterator[_Batch]:
    families: dict[tuple[str, int], list[_Stage]] = {}
    for stage in stages:
        if stage.family:
            families.setdefault((stage.family, stage.columns), []).append(stage)
    for (_, columns), family in families.items():
        most = experts_per_batch[columns]
        for start in range(0, len(family), most):
            batch = family[start : start + most]
            owners = dealt([float(sum(stage.rows) * columns) for stage in batch], ranks)
            yield _Batch(columns, batch, owners)
