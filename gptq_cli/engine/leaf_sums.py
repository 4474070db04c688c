"""The moments of a stage over the samples of all ranks.

Each rank adds the tokens of its own samples. When its micro-batches come to another leaf (`ranks.leaves`),
what was summed since the last one goes into a tree of sums (`ranks.tree`); at the end the trees of all ranks
are put together, and every rank has the sums over all samples. Where samples are not cut, nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from gptq_cli.gptq.hessian import Hessian
from gptq_cli.gptq.moment import Moment
from gptq_cli.ranks.leaves import part_of
from gptq_cli.ranks.team import Nodes, Parcel, Team
from gptq_cli.ranks.tree import Node, TreeSum

Owners = Callable[[Sequence[int]], Sequence[int | None]]
"""From the tokens of each moment, of all ranks, the rank that needs it; None: no rank does."""


@dataclass(frozen=True, slots=True)
class _Account:
    """What a rank has of a moment."""

    tokens: int
    nodes: list[Node]


class LeafSums:
    """Sums leaf by leaf: `reach` every micro-batch before it is added, `finish` once."""

    def __init__(self, team: Team, leaves: Sequence[int], parts: Sequence[Moment]) -> None:
        """`leaves`: of this rank's micro-batches; `parts`: as many, and of the same sizes, on every rank."""
        self._team, self._leaf_of = team, leaves
        self._parts = list(parts) if team.leaves else []
        own = part_of(team.leaves, team.rank, team.size)
        self._trees = [TreeSum(own) for _ in self._parts]
        self._leaf: int | None = None

    def reach(self, place: int) -> None:
        """Micro-batch number `place` comes next."""
        if not self._parts:
            return
        leaf = self._leaf_of[place]
        if self._leaf is not None and leaf != self._leaf:
            self._put_aside(self._leaf)
        self._leaf = leaf

    def finish(self) -> None:
        """Have the sums over the samples of all ranks in the moments."""
        if not self._parts:
            return
        nodes, accounts = self._gathered()
        for place, part in enumerate(self._parts):
            present = [of_rank[place].nodes for of_rank in accounts]
            flat = self._team.summed(nodes[place], present, part.stored_values) if any(present) else None
            nodes[place] = []
            if flat is not None:
                part.put(flat, sum(of_rank[place].tokens for of_rank in accounts))

    def _gathered(self) -> tuple[list[Nodes], list[list[_Account]]]:
        """The nodes of every tree, and of every rank what it has of each."""
        if self._leaf is not None:
            self._put_aside(self._leaf)
        nodes = [tree.nodes() for tree in self._trees]
        self._trees.clear()
        there = [[node for node, value in own if value is not None] for own in nodes]
        tokens = [part.tokens for part in self._parts] + [0] * (len(nodes) - len(self._parts))
        own = [_Account(*both) for both in zip(tokens, there, strict=True)]
        return nodes, self._team.gathered(own)

    def _put_aside(self, leaf: int) -> None:
        for part, tree in zip(self._parts, self._trees, strict=False):
            flat = part.take()
            if flat is not None:
                tree.add((leaf, 1), flat)


class OwnedSums(LeafSums):
    """The same of experts: each rank gets the sums of its own, and every rank the sum of all.

    What a rank does not need does not travel to it: half of what it takes for all to have all.
    """

    def __init__(self, team: Team, leaves: Sequence[int], parts: Sequence[Moment], owners: Owners) -> None:
        super().__init__(team, leaves, parts)
        self._owners = owners
        self.pooled: Hessian | None = None
        """Of the tokens of all of them; None where samples are not cut."""
        if self._parts:
            self._trees.append(TreeSum(part_of(team.leaves, team.rank, team.size)))

    def finish(self) -> None:
        """See `LeafSums.finish`. A moment that another rank has is freed, and knows its tokens."""
        if not self._parts:
            return
        nodes, accounts = self._gathered()
        parts, first = self._parts, self._parts[0]
        length, device = first.stored_values, first.device
        tokens = [sum(of_rank[place].tokens for of_rank in accounts) for place in range(len(parts))]
        owners = self._owners(tokens)
        for part, owner, seen in zip(parts, owners, tokens, strict=True):
            if owner != self._team.rank:
                part.elsewhere(seen)
        present = [of_rank[-1].nodes for of_rank in accounts]
        flat = self._team.summed(nodes.pop(), present, length) if any(present) else None
        self.pooled = Hessian(first.in_features, device)
        if flat is not None:
            self.pooled.put(flat, sum(tokens))
        del flat
        sent = [
            Parcel(nodes[place], [of_rank[place].nodes for of_rank in accounts], owner, place)
            for place, owner in enumerate(owners)
            if owner is not None
        ]
        nodes.clear()
        for place, flat in self._team.delivered(sent, length):
            parts[place].put(flat, tokens[place])
            del flat  # before the next one comes

    def _put_aside(self, leaf: int) -> None:
        every: Tensor | None = None
        for part, tree in zip(self._parts, self._trees, strict=False):
            flat = part.take()
            if flat is not None:
                every = flat.clone() if every is None else every.add_(flat)
                tree.add((leaf, 1), flat)
        if every is not None:
            self._trees[-1].add((leaf, 1), every)
