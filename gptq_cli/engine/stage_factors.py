"""The factorisations of a stage, made by all ranks together.

A stage that is solved for the dense model's output takes about five, one after the other: of the H of the
tokens that a step is made from, with each λ that is tried (`gptq.choice`: two to four); of H with the λ that
was found best, for the step; and of H for the solve. Rows are shared out, these are not: each is K³ / 6
multiply-adds, and a matrix with few columns for many ranks. But only the step has to wait for another's
result, which says its λ.

So each λ is tried on a rank of its own, in rounds of as many as there are ranks. Ranks that have none to try
in the first round work ahead: the first of them factorises H for the solve, the next ones H with one λ each
that may be found best. What was made ahead travels to all ranks when it is its turn, a lower block triangle
in fp32. What was not made ahead, each rank makes for itself, as one process does.

The codes are those of one process: every rank makes its choice from the same numbers, and a factor that
travelled has the bits of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.choice import Tried
from gptq_cli.gptq.factor import Factor, factorize
from gptq_cli.gptq.goal import step_factor
from gptq_cli.gptq.rounding import column_order
from gptq_cli.gptq.triangle import block_rows
from gptq_cli.ranks.leaves import made_ahead
from gptq_cli.ranks.team import Team

_Purpose = float | Literal["solve"]
"""What a factor is for: the step with this λ, or the solve."""


@dataclass(frozen=True, slots=True)
class _Made:
    """What all ranks are told of a factor that one of them has made."""

    purpose: _Purpose
    damping: float
    damp_percent: float
    attempts: int
    works: bool
    """It is there: some damping made H positive definite."""


class StageFactors:
    """Of one stage; see `gptq.choice.Factors`. All ranks call the same methods in the same order."""

    def __init__(
        self,
        team: Team,
        hessian: Tensor,  # (K, K) of all tokens
        config: QuantizeConfig,
    ) -> None:
        self._team, self._hessian, self._config = team, hessian, config
        self._own: Tensor | None = None
        self._ahead: dict[_Purpose, tuple[int, _Made]] = {}
        """By purpose, the rank that has made it."""

    def tried(self, step: Callable[[float], Tried | None], ladder: Sequence[float]) -> Iterator[Tried | None]:
        """See `gptq.choice.Factors.tried`."""
        rank, size = self._team.rank, self._team.size
        purposes: Sequence[_Purpose] = [] if self._ahead else ("solve", *ladder)
        ahead = made_ahead(purposes, len(ladder), size)
        for start in range(0, len(ladder), size):
            several = ladder[start : start + size]
            own = step(several[rank]) if rank < len(several) else self._made(ahead.get(rank))
            found = self._team.gathered(own)
            self._ahead |= {one.purpose: (at, one) for at, one in enumerate(found) if isinstance(one, _Made)}
            yield from (one for one in found[: len(several)] if not isinstance(one, _Made))

    def for_step(self, hessian: Tensor, damp_percent: float) -> Factor:
        """See `gptq.choice.Factors.for_step`."""
        factor = self._travelled(damp_percent) or step_factor(hessian, damp_percent)
        if not self._makes("solve"):
            self._own = None
        return factor

    def for_solve(self) -> Factor | None:
        """Of H in the order in which its columns are solved; None where no rank has made it ahead."""
        factor = self._travelled("solve")
        self._own = None
        return factor

    def _made(self, purpose: _Purpose | None) -> _Made | None:
        """Work ahead."""
        if purpose is None:
            return None
        if purpose == "solve":
            factor = factorize(
                self._hessian, column_order(self._hessian, self._config), self._config.damp_percent
            )
        else:
            factor = step_factor(self._hessian, purpose)
        self._own = factor.RT
        works = factor.RT is not None
        return _Made(purpose, float(factor.damping), factor.damp_percent, factor.attempts, works)

    def _makes(self, purpose: _Purpose) -> bool:
        """Whether this rank has made it."""
        return purpose in self._ahead and self._ahead[purpose][0] == self._team.rank

    def _travelled(self, purpose: _Purpose) -> Factor | None:
        """The factor that one rank has made, on all."""
        if purpose not in self._ahead:
            return None
        source, made = self._ahead[purpose]
        damping = torch.tensor(made.damping, dtype=self._hessian.dtype, device=self._hessian.device)
        return Factor(
            RT=self._triangle(source) if made.works else None,
            damping=damping,
            damp_percent=made.damp_percent,
            attempts=made.attempts,
        )

    def _triangle(self, source: int) -> Tensor:  # (K, K)
        """What rank `source` has made, on all."""
        mine = self._own if self._team.rank == source else None
        triangle = self._hessian.new_zeros(self._hessian.shape) if mine is None else mine
        for a, b in block_rows(triangle.shape[0]):
            piece = triangle[a:b, :b].contiguous()
            self._team.carry(piece, source)
            if mine is None:
                triangle[a:b, :b] = piece
        return triangle
