"""How many factorisations of a stage follow one another, and who sends one: see `engine.stage_factors`."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.planning.cases import Work
from gptq_cli.ranks.leaves import made_ahead

TRIED = 3
"""λ that are tried for a step until the loss rises. An assumption: two to four, for one of 0.05."""


@dataclass(frozen=True, slots=True)
class FactorPlan:
    """Of a stage that every token goes through."""

    in_a_row: int = 1
    """Factorisations that wait for each other."""
    senders: tuple[int, ...] = ()
    """Ranks that make one ahead for all: that for the solve, and that for a step. Which λ will be found best
    is not known: the first is counted."""


def factor_plan(work: Work) -> FactorPlan:
    """What `work.ranks` ranks do, and what one does by itself."""
    from gptq_cli.gptq.choice import damp_ladder
    from gptq_cli.gptq.moments import HELD_OUT_SHARE

    pairs = work.paired_samples
    if pairs < HELD_OUT_SHARE:  # none is held out, so no step is made
        return FactorPlan()
    ladder, ranks = damp_ladder(work.quantize.damp_percent), max(1, work.ranks)
    ahead = made_ahead(("solve", "step"), len(ladder), ranks)
    tried = -(-min(TRIED, len(ladder)) // ranks)
    return FactorPlan(tried + 2 - len(ahead), tuple(ahead))
