"""How far to go towards the asymmetric target, and with which damping: what held-out tokens say of each λ.

The steps that are compared share nothing but their inputs: several processes may try one λ each (`Factors`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptq_cli.gptq.factor import Factor
from gptq_cli.gptq.goal import asymmetric_step, step_factor
from gptq_cli.gptq.matmul import fast_matmul

_DAMP_FACTOR, _MAX_DAMP = 4.0, 4.0
"""Factor from one λ tried to the next, and the last λ: the loss is flat, a factor of 2 costs 1 to 7 %."""


@dataclass(frozen=True, slots=True)
class StepChoice:
    """How far the step goes, as held-out tokens show."""

    alpha: float = 0.0
    """0: not at all."""
    damp_percent: float = 0.0
    """λ of the step, as a fraction of the mean diagonal of H."""
    moved: float = 0.0
    """‖W' - W‖ / ‖W‖, of all rows of the stage."""
    bounded_rows: int = 0
    """Rows that would have moved farther than `bounded_step` lets them."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What held-out tokens say of the step with one λ."""

    alpha: float
    change: float
    """Of the loss, with this α; not above 0."""
    damp_percent: float
    """The damping that was used: more than was asked for where that did not factorise H."""


class Factors(Protocol):
    """Who makes the factorisations of a stage: this process, or several that each make some."""

    def tried(self, step: Callable[[float], Tried | None], ladder: Sequence[float]) -> Iterator[Tried | None]:
        """What `step` finds for each λ of the ladder, in order, as far as it is asked for."""
        ...

    def for_step(
        self,
        H: Tensor,  # (K, K)
        damp_percent: float,
        /,
    ) -> Factor:
        """Of H, its columns in their own order."""
        ...


class OwnFactors:
    """One process makes each when it is asked for."""

    def tried(self, step: Callable[[float], Tried | None], ladder: Sequence[float]) -> Iterator[Tried | None]:
        """See `Factors.tried`."""
        return map(step, ladder)

    def for_step(self, H: Tensor, damp_percent: float) -> Factor:
        """See `Factors.for_step`."""
        return step_factor(H, damp_percent)


OWN_FACTORS = OwnFactors()


def damp_ladder(damp_percent: float) -> list[float]:
    """Each λ that may be tried, from the smallest."""
    ladder = []
    while damp_percent <= _MAX_DAMP:
        ladder.append(damp_percent)
        damp_percent *= _DAMP_FACTOR
    return ladder


def held_out_alpha(
    B: Tensor,  # (N, K) of held-out tokens
    V: Tensor,  # (N, K) a step made from other tokens
    H: Tensor,  # (K, K) of held-out tokens
) -> tuple[float, float]:
    """The α in [0, 1] that minimises E‖W x_dense - (W + αV) x‖² on held-out tokens, and the change in loss.

    The loss is const - 2α·tr(B Vᵀ) + α²·tr(V H Vᵀ). For a stage, stack the rows of its linears.
    """
    with fast_matmul():
        along, curve = torch.stack([(B * V).sum(), ((V @ H) * V).sum()]).tolist()
    alpha = min(max(along / curve, 0.0), 1.0) if curve > 0 else 0.0
    return alpha, alpha * (alpha * curve - 2 * along)


def choose_step(
    B: Tensor,  # (N, K) of the tokens that the step is made from
    H: Tensor,  # (K, K) of these
    B_held: Tensor,  # (N, K) of held-out tokens
    H_held: Tensor,  # (K, K) of these
    damp_percent: float,  # the smallest λ, the solver's
    factors: Factors = OWN_FACTORS,
) -> StepChoice:
    """The λ and the α with the smallest loss on the held-out tokens.

    λ is raised until the loss rises. Cost: two to four steps for a λ of 0.05. What is chosen does not depend
    on who makes the factors, nor on how many were made that nobody asked for.
    """

    def step(damp: float) -> Tried | None:
        V, used = asymmetric_step(B, H, damp)
        return None if V is None else Tried(*held_out_alpha(B_held, V, H_held), used)

    best, lowest = StepChoice(), 0.0
    ladder = damp_ladder(damp_percent)
    while ladder:
        rest, ladder = ladder, []
        for damp, found in zip(rest, factors.tried(step, rest), strict=False):
            if found is None:
                return best
            if found.change < lowest:
                best, lowest = StepChoice(found.alpha, found.damp_percent), found.change
            elif best.alpha:
                return best
            if found.damp_percent != damp:  # H needed more: the ladder goes on from there
                ladder = damp_ladder(found.damp_percent * _DAMP_FACTOR)
                break
    return best
