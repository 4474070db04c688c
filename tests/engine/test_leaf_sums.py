"""Sums of experts: the owner's, and of all. Against several processes: tests/e2e/test_ranks.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.engine.leaf_sums import OwnedSums
from gptq_cli.gptq.hessian import Hessian
from gptq_cli.ranks.leaves import part_of
from gptq_cli.ranks.team import Alone

K = 12


def texts() -> list[Tensor]:  # of each leaf (tokens, K)
    random = torch.Generator().manual_seed(1)
    return [torch.randn(5 + leaf, K, generator=random) for leaf in range(16)]


def summed(team: Alone, owners: list[int | None]) -> tuple[list[Hessian], OwnedSums, list[int]]:
    """Two experts that see every second leaf each, and one that sees none."""
    moments, told = [Hessian(K) for _ in range(3)], list[int]()

    def owners_of(tokens: Sequence[int]) -> list[int | None]:
        told.extend(tokens)
        return owners

    own = part_of(16, team.rank, team.size)
    sums = OwnedSums(team, tuple(own), moments, owners_of)
    for place, leaf in enumerate(own):
        sums.reach(place)
        moments[leaf % 2].add(texts()[leaf])
    sums.finish()
    return moments, sums, told


def test_the_owner_has_the_sum_and_all_have_that_of_all() -> None:
    moments, sums, told = summed(Alone(16), [0, 0, None])
    seen = [torch.cat(texts()[first::2]) for first in (0, 1)]
    assert told == [len(seen[0]), len(seen[1]), 0]
    for moment, x in zip(moments, seen, strict=False):
        torch.testing.assert_close(moment.matrix(), x.T @ x / len(x))
    every = torch.cat(texts())
    assert sums.pooled is not None
    assert sums.pooled.tokens == len(every)
    torch.testing.assert_close(sums.pooled.matrix(), every.T @ every / len(every))


def test_what_nobody_needs_is_freed_and_its_tokens_are_known() -> None:
    moments, _, told = summed(Alone(16), [0, 1, None])
    assert [moment.here for moment in moments] == [True, False, False]
    assert [moment.tokens for moment in moments] == told


def test_samples_that_are_not_cut_are_left_alone() -> None:
    moments, sums, told = summed(Alone(), [0, 0, None])
    assert (sums.pooled, told) == (None, [])
    assert all(moment.here for moment in moments)
