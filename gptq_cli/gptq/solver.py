"""Weights and H in, codes out: the entry point of the maths.

One call quantizes the linears of a stage. They read the same input, so they share one H and one factor. GPTQ
never mixes rows, so the rows of all of them are stacked and solved together.

    1  refuse NaN, infinity, and weights whose scales float16 cannot hold
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

import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import NonFinite
from gptq_cli.gptq.columns import gptq
from gptq_cli.gptq.factor import dead_columns, factorize
from gptq_cli.gptq.grid import FP16_MAX, Grid, Solution, round_to_nearest
from gptq_cli.gptq.losses import relative_losses, row_losses
from gptq_cli.gptq.matmul import exact_matmul, fast_matmul
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.refine import refine_once
from gptq_cli.gptq.search import group_parameters
from gptq_cli.results.run import Method


def column_order(H: Tensor, config: QuantizeConfig) -> Tensor:  # (K,) int64
    """The original column that is solved i-th: by descending H_kk where an order is set; ties keep theirs."""
    if config.desc_act or config.act_order == "static":
        return torch.argsort(H.diagonal(), descending=True, stable=True)
    return torch.arange(H.shape[0], device=H.device)


@exact_matmul()
def quantize_linears(
    weights: Sequence[Tensor],  # (N_i, K) each: the linears of a stage, which read the same input
    H: Tensor,  # (K, K) mean of x xᵀ, undamped; float64 makes the whole solve run in float64
    config: QuantizeConfig,
    *,
    goals: Sequence[Tensor] | None = None,  # (N_i, K) each: the weights to approximate, see goal.py
) -> list[QuantizedLinear]:
    """Quantize the linears of a stage: rows stacked, one factorisation. No argument is changed.

    With `goals` the codes approximate these instead, and losses are measured against them. When no allowed
    damping makes H positive definite, or H is all zero, the result is round-to-nearest with the configured
    scale search, and `method` is "rtn".

    Raises `NonFinite` for NaN or infinity in H or in a weight, and for weights whose scales float16 cannot
    hold; `ValueError` for shapes that do not match.
    """
    grid = Grid.of(config)
    H = H if H.dtype in (torch.float32, torch.float64) else H.float()
    _refuse_nonfinite([*weights, *(goals or ())], H, grid)
    K = H.shape[0]
    group = config.for_columns([K]).group_columns
    g = K if group == -1 else min(group, K)
    rows = [weight.shape[0] for weight in weights]
    aims = weights if goals is None else goals

    energy, rtn_error = _baseline(_stack(weights, H), None if goals is None else _stack(goals, H), H, g, grid)
    order = column_order(H, config)
    factor = factorize(H, order, config.damp_percent)
    method: Method = "rtn" if factor.RT is None else "gptq"
    if factor.RT is None:
        W = _stack(aims, H)
        solution = round_to_nearest(W, *group_parameters(W, H.diagonal(), g, grid), g, grid)
        error = row_losses(solution.D, H)
    else:
        solution, damped = _solve(_stack(aims, H), H, order, factor.RT, g, grid, config)
        factor = replace(factor, RT=None)  # K² numbers, no longer needed
        error = _refined(solution, damped, H, factor.damping, config)

    g_idx = torch.empty(K, dtype=torch.int32, device=H.device)
    g_idx[solution.columns] = torch.arange(K, dtype=torch.int32, device=H.device) // g
    parts = zip(
        torch.split(solution.codes, rows, 1),
        torch.split(solution.scales, rows, 1),
        torch.split(solution.zeros, rows, 1),
        relative_losses(error, energy, rows),
        relative_losses(rtn_error, energy, rows),
        strict=True,
    )
    return [
        QuantizedLinear(
            codes=codes.T.contiguous(),
            scales=scales.T.to(torch.float16).contiguous(),
            zeros=zeros.T.to(torch.uint8).contiguous(),
            g_idx=g_idx,
            loss=loss,
            rtn_loss=rtn_loss,
            damp_percent=factor.damp_percent,
            attempts=factor.attempts,
            method=method,
        )
        for codes, scales, zeros, loss, rtn_loss in parts
    ]


def _solve(
    W: Tensor, H: Tensor, order: Tensor, RT: Tensor, g: int, grid: Grid, config: QuantizeConfig
) -> tuple[Solution, Tensor]:  # and the damped loss of every row (N,)
    """GPTQ with the configured order and groups; the result is in the original order."""
    K, N = W.shape
    natural = torch.arange(K, device=W.device)
    diagonal = H.diagonal()
    static = config.act_order == "static" and not config.desc_act
    W[dead_columns(H)] = 0
    if static:
        scales, zeros = group_parameters(W, diagonal, g, grid)
        group_of, columns = order // g, natural
    else:
        scales, zeros = W.new_empty(-(-K // g), N), W.new_empty(-(-K // g), N)
        group_of, columns = natural // g, order
    W = W.index_select(0, order)
    codes, damped = gptq(
        W, RT, diagonal[order], group_of, scales, zeros, g, grid,
        dynamic=not static, column_batch=config.column_batch,
    )  # fmt: skip
    back = torch.argsort(order)
    codes, D = codes.index_select(0, back), W.index_select(0, back)
    solution = Solution(
        codes=codes, D=D, scales=scales, zeros=zeros, columns=columns, group_size=g, grid=grid
    )
    return solution, damped


def _refined(
    solution: Solution, damped: Tensor, H: Tensor, damping: Tensor, config: QuantizeConfig
) -> Tensor:  # (N,)
    """Refine in place and undo rows whose damped loss did not fall; returns the undamped loss of every
    row."""
    before = damped - damping * solution.D.square().sum(0)
    passes = max(config.sweeps, int(config.refit))
    if passes == 0:
        return before
    codes, scales = solution.codes.clone(), solution.scales.clone()
    for i in range(passes):
        refine_once(
            solution, H, damping,
            sweep=i < config.sweeps, refit=config.refit, column_batch=config.column_batch,
        )  # fmt: skip
    with exact_matmul():
        after = row_losses(solution.D, H)
    worse = ~(after + damping * solution.D.square().sum(0) < damped)
    solution.codes.copy_(torch.where(worse, codes, solution.codes))
    solution.scales.copy_(torch.where(worse, scales, solution.scales))
    return torch.where(worse, before, after)


def _stack(weights: Sequence[Tensor], H: Tensor) -> Tensor:  # (K, ΣN) transposed, H's dtype and device
    W = torch.empty(H.shape[0], sum(weight.shape[0] for weight in weights), dtype=H.dtype, device=H.device)
    for part, weight in zip(torch.split(W, [w.shape[0] for w in weights], 1), weights, strict=True):
        part.copy_(weight.T)
    return W


def _baseline(
    W: Tensor, goal: Tensor | None, H: Tensor, g: int, grid: Grid
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Row losses of W itself, and of round-to-nearest with min/max scales.

    Round-to-nearest rounds W, because it does not know the goal; its loss is measured against the goal.
    """
    plain = Grid(bits=grid.bits, sym=grid.sym, positive_scales=False, search="minmax")
    with fast_matmul():
        energy = row_losses(W, H)
        scales, zeros = group_parameters(W, H.diagonal(), g, plain)
        D = round_to_nearest(W, scales, zeros, g, plain).D
        return energy, row_losses(D if goal is None else D.add_(goal).sub_(W), H)


def _refuse_nonfinite(weights: Sequence[Tensor], H: Tensor, grid: Grid) -> None:
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"H has shape {tuple(H.shape)}; expected a square matrix")
    if not bool(torch.isfinite(torch.stack(torch.aminmax(H))).all().item()):
        raise NonFinite(
            "the Hessian holds NaN or infinity", hint="an activation overflowed: try --dtype bfloat16"
        )
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != H.shape[0]:
            raise ValueError(f"a weight has shape {tuple(weight.shape)}; H has {H.shape[0]} features")
        largest = float(torch.stack(torch.aminmax(weight)).abs().max().item())
        if not largest < torch.inf:
            raise NonFinite("the weight holds NaN or infinity")
        if largest / grid.half > FP16_MAX:
            raise NonFinite(
                f"the weight reaches {largest:.3g}: its scales would be infinite in float16, "
                f"which ends at {FP16_MAX:.0f}"
            )
