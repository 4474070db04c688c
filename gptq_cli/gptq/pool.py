"""What linears that share the tokens of a block know together: the pooled Hessian.

Tokens are routed to experts, so that each sees a part of them. One that received few has too few for its K
directions, and one that received none has no Hessian; together they say what the tokens of the block are
like. So each Hessian is shrunk towards that of all tokens, the more the fewer tokens it has
(`hessian.shrink`). The experts of a block are collected in batches, and the pool grows with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.gptq.hessian import shrink
from gptq_cli.gptq.moments import StageMoments


class Pool:
    """The mean of x xᵀ over the tokens of every linear of a kind that has been added."""

    def __init__(self) -> None:
        self.tokens = 0
        """Counted once for every linear that saw them."""
        self._mean: Tensor | None = None

    def add(
        self,
        H: Tensor,  # (K, K) mean over `tokens`
        tokens: int,
    ) -> None:
        """Add the tokens of one linear."""
        self.tokens += tokens
        if self._mean is None:
            self._mean = torch.zeros_like(H)
        if tokens:
            self._mean.lerp_(H, tokens / self.tokens)

    def hessian(self) -> Tensor:  # (K, K)
        """The mean; zeros where there was no token. Raises `ValueError` where nothing was added."""
        if self._mean is None:
            raise ValueError("an empty pool has no Hessian")
        return self._mean


def shrink_to_pooled(
    moments: Sequence[StageMoments],  # of linears with the same K, each seeing part of the tokens
    pool: Pool,  # of those that came before; these are added to it
) -> list[Tensor]:  # (K, K) each
    """The Hessian of each, shrunk towards that of all their tokens together. The moments are freed.

    A linear without tokens gets the pool itself.
    """
    for moment in moments:
        pool.add(moment.hessian(), moment.tokens)
    return shrink_to(pool, moments)


def shrink_to(pool: Pool, moments: Sequence[StageMoments]) -> list[Tensor]:  # (K, K) each
    """The Hessian of each, shrunk towards the pool as it is. The moments are freed."""
    shrunk = []
    for moment in moments:
        shrunk.append(shrink(moment.hessian(), moment.tokens, pool.hessian()))
        moment.free()
    return shrunk
