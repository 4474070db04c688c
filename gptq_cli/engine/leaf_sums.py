"""The moments of a stage over the samples of all ranks.

Each rank adds the tokens of its own samples. When its micro-batches come to another leaf (`ranks.leaves`),
what was summed since the last one goes into a tree of sums (`ranks.tree`); at the end the trees of all ranks
are put together, and every rank has the sums over all samples. Where samples are not cut, nothing happens.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptq_cli.gptq.moment import Moment
from gptq_cli.ranks.leaves import part_of
from gptq_cli.ranks.team import Team
from gptq_cli.ranks.tree import TreeSum


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
        if self._leaf is not None:
            self._put_aside(self._leaf)
        nodes = [tree.nodes() for tree in self._trees]
        self._trees.clear()
        there = [[node for node, value in own if value is not None] for own in nodes]
        account = [(part.tokens, found) for part, found in zip(self._parts, there, strict=True)]
        accounts = self._team.gathered(account)
        for place, part in enumerate(self._parts):
            of_ranks = [account[place] for account in accounts]
            present = [found for _, found in of_ranks]
            flat = self._team.summed(nodes[place], present, part.stored_values) if any(present) else None
            nodes[place] = []
            if flat is not None:
                part.put(flat, sum(tokens for tokens, _ in of_ranks))

    def _put_aside(self, leaf: int) -> None:
        for part, tree in zip(self._parts, self._trees, strict=True):
            flat = part.take()
            if flat is not None:
                tree.add((leaf, 1), flat)
