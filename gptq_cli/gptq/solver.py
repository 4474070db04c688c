"""Weights and H in, codes out: the entry point of the maths.

One call quantizes the linears of a stage. They read the same input, so they share one H and one factor. GPTQ
never mixes rows, so the rows of all of them are stacked and solved together. Stages of one shape, as those of
experts are, can be solved side by side, see batch.py.

    1  refuse NaN, infinity, and weights whose scales float16 cannot hold    inputs.py
    2  measure round-to-nearest with min/max scales, the baseline
    3  factorise H, in solving order, with as little damping as works        factor.py
    4  find the groups' scales where they are static                         search.py
    5  the loop over columns                                                 columns.py
    6  refine codes and scales; keep a row only if its damped loss fell      refine.py

Where no damping works, or H is all zero, the codes are round-to-nearest with the same scale search, and
`method` is "rtn".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.batch import diagonal_of
from gptq_cli.gptq.factor import Factor, factorize_each
from gptq_cli.gptq.feedback import OutputMoment, solve_in_parts
from gptq_cli.gptq.grid import Grid, round_to_nearest
from gptq_cli.gptq.inputs import refuse_unsolvable, stack_rows
from gptq_cli.gptq.losses import baseline_losses, relative_losses, row_losses
from gptq_cli.gptq.matmul import exact_matmul
from gptq_cli.gptq.quantized import QuantizedLinear, cut_stages
from gptq_cli.gptq.rounding import column_order, group_width, refined, solve_columns, solve_rows
from gptq_cli.gptq.search import group_parameters
from gptq_cli.gptq.walk_choice import walk_on


def quantize_linears(
    weights: Sequence[Tensor],  # (N_i, K) each: the linears of a stage, which read the same input
    H: Tensor,  # (K, K) mean of x xᵀ, undamped; float64 makes the whole solve run in float64
    config: QuantizeConfig,
    *,
    goals: Sequence[Tensor] | None = None,  # (N_i, K) each: the weights to approximate, see goal.py
    factor: Factor | None = None,  # of H in its `column_order`, where somebody has made it
    outputs: Sequence[OutputMoment | None] = (),  # of each linear: rows make up for others, see feedback.py
) -> list[QuantizedLinear]:
    """Quantize the linears of a stage: rows stacked, one factorisation. No argument is changed.

    With `goals` the codes approximate these instead, and losses are measured against them. With `outputs` it
    is not these losses that are least, but what they do to the model's. When no allowed
    damping makes H positive definite, or H is all zero, the result is round-to-nearest with the configured
    scale search, and `method` is "rtn".

    Raises `NonFinite` for NaN or infinity in H or in a weight, and for weights whose scales float16 cannot
    hold; `ValueError` for shapes that do not match.
    """
    grid = Grid.of(config)
    H = H if H.dtype in (torch.float32, torch.float64) else H.float()
    refuse_unsolvable([[*weights, *(goals or ())]], H.unsqueeze(0), grid)
    return _quantized([weights], None if goals is None else [goals], H, grid, config, factor, outputs)[0]


def quantize_stages(
    stages: Sequence[Sequence[Tensor]],  # per stage its linears' weights (N_i, K): the same shapes in each
    H: Tensor,  # (E, K, K) of each stage
    config: QuantizeConfig,
) -> list[list[QuantizedLinear]]:
    """Quantize stages of one shape side by side: what `quantize_linears` gives for each, in less time.

    A stage whose H needs more damping, or falls back, does so by itself. Raises like `quantize_linears`.
    """
    grid = Grid.of(config)
    H = H if H.dtype in (torch.float32, torch.float64) else H.float()
    refuse_unsolvable(stages, H, grid)
    return _quantized(stages, None, H if len(stages) > 1 else H[0], grid, config)


@exact_matmul()
def _quantized(
    stages: Sequence[Sequence[Tensor]],
    goals: Sequence[Sequence[Tensor]] | None,
    H: Tensor,  # (K, K) for one stage, (E, K, K) for more
    grid: Grid,
    config: QuantizeConfig,
    factor: Factor | None = None,
    outputs: Sequence[OutputMoment | None] = (),
) -> list[list[QuantizedLinear]]:
    K = H.shape[-1]
    g = group_width(K, config)
    rows = [weight.shape[0] for weight in stages[0]]

    aims = stages if goals is None else goals
    goal = None if goals is None else stack_rows(goals, H)
    energy, rtn_error = baseline_losses(stack_rows(stages, H), goal, H, g, grid)
    del goal
    order = column_order(H, config)
    if factor is None:
        RT, factors = factorize_each(H.view(-1, K, K), order, config.damp_percent)
    else:
        RT, factors = H if factor.RT is None else factor.RT, [factor]
    works = [one.RT is not None for one in factors]
    factors = [replace(one, RT=None) for one in factors]
    del factor
    if any(works) and not all(works):
        del RT
        return _apart(stages, H, works, config)
    if works[0]:
        walk = walk_on(H.device, H.dtype)
        damping = torch.stack([one.damping for one in factors]).view(H.shape[:-2])
        if any(outputs):
            solve = partial(solve_rows, H, order, RT.view(H.shape), damping, g, grid, config, walk)
            solution = solve_in_parts(stack_rows(aims, H), outputs, rows, solve)
            error = row_losses(solution.D, H)
        else:
            W = stack_rows(aims, H)
            solution, damped = solve_columns(W, H, order, RT.view(H.shape), g, grid, config, walk)
            del RT  # K² numbers, no longer needed
            error = refined(solution, damped, H, damping, config, walk)
    else:
        W = stack_rows(aims, H)
        solution = round_to_nearest(W, *group_parameters(W, diagonal_of(H), g, grid), g, grid)
        error = row_losses(solution.D, H)
    both, parts = (error.flatten(), rtn_error.flatten()), rows * len(stages)
    (losses, rtn_losses), sums = relative_losses(both, energy.flatten(), parts)
    return cut_stages(solution, rows, factors, losses, rtn_losses, sums, "gptq" if works[0] else "rtn")


def _apart(
    stages: Sequence[Sequence[Tensor]], H: Tensor, works: Sequence[bool], config: QuantizeConfig
) -> list[list[QuantizedLinear]]:
    """Stages of which some fall back: these and the others each in a batch of their own."""
    solved: list[list[QuantizedLinear]] = [[] for _ in stages]
    for kind in (True, False):
        batch = [e for e, works_here in enumerate(works) if works_here == kind]
        found = quantize_stages([stages[e] for e in batch], H[batch], config)
        for e, linears in zip(batch, found, strict=True):
            solved[e] = linears
    return solved
