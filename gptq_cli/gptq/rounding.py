"""From goals and a factor to codes: the order of columns, the loop over them, and the refinement."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.batch import diagonal_of, rows_of
from gptq_cli.gptq.columns import gptq
from gptq_cli.gptq.factor import dead_columns
from gptq_cli.gptq.grid import Grid, Solution
from gptq_cli.gptq.losses import row_losses
from gptq_cli.gptq.matmul import exact_matmul
from gptq_cli.gptq.refine import refine_once
from gptq_cli.gptq.search import group_parameters
from gptq_cli.gptq.walk import Walk


def column_order(H: Tensor, config: QuantizeConfig) -> Tensor:  # (…, K) int64
    """The original column that is solved i-th: by descending H_kk where an order is set; ties keep theirs.
    Without an order it is (K,) for any H."""
    if config.desc_act or config.act_order == "static":
        return torch.argsort(diagonal_of(H), dim=-1, descending=True, stable=True)
    return torch.arange(H.shape[-1], device=H.device)


def group_width(K: int, config: QuantizeConfig) -> int:
    """Columns of a group where there are K: all of them for a group size of -1, and where it is larger."""
    group = config.for_columns([K]).group_columns
    return K if group == -1 else min(group, K)


def solve_rows(
    H: Tensor,
    order: Tensor,
    RT: Tensor,  # (K, K)
    damping: Tensor,  # λ
    g: int,
    grid: Grid,
    config: QuantizeConfig,
    walk: Walk,
    W: Tensor,  # (K, N); changed
) -> Solution:
    """Some rows of one stage."""
    solution, damped = solve_columns(W, H, order, RT, g, grid, config, walk)
    refined(solution, damped, H, damping, config, walk)
    return solution


def solve_columns(
    W: Tensor, H: Tensor, order: Tensor, RT: Tensor, g: int, grid: Grid, config: QuantizeConfig, walk: Walk
) -> tuple[Solution, Tensor]:  # and the damped loss of every row (…, N)
    """GPTQ with the configured order and groups; the result is in the original order."""
    K, N = W.shape[-2:]
    natural = torch.arange(K, device=W.device)
    diagonal = diagonal_of(H)
    static = config.act_order == "static" and not config.desc_act
    W.masked_fill_(dead_columns(H).unsqueeze(-1), 0)
    if static:
        scales, zeros = group_parameters(W, diagonal, g, grid)
        group_of, columns = order // g, natural
    else:
        scales, zeros = W.new_empty(2, *W.shape[:-2], -(-K // g), N)
        group_of, columns = natural // g, order
    W = rows_of(W, order)
    codes, damped = gptq(
        W, RT, diagonal.gather(-1, order.expand(diagonal.shape)), group_of, scales, zeros, g, grid,
        dynamic=not static, column_batch=config.column_batch, walk=walk,
    )  # fmt: skip
    back = torch.argsort(order)
    codes, D = rows_of(codes, back), rows_of(W, back)
    solution = Solution(
        codes=codes, D=D, scales=scales, zeros=zeros, columns=columns, group_size=g, grid=grid
    )
    return solution, damped


def refined(
    solution: Solution, damped: Tensor, H: Tensor, damping: Tensor, config: QuantizeConfig, walk: Walk
) -> Tensor:  # (…, N)
    """Refine in place and undo rows whose damped loss did not fall; returns the undamped loss of every
    row."""
    before = damped - damping.unsqueeze(-1) * solution.D.square().sum(-2)
    passes = max(config.sweeps, int(config.refit))
    if passes == 0:
        return before
    codes, scales = solution.codes.clone(), solution.scales.clone()
    for i in range(passes):
        refine_once(
            solution, H, damping,
            sweep=i < config.sweeps, refit=config.refit, column_batch=config.column_batch, walk=walk,
        )  # fmt: skip
    with exact_matmul():
        after = row_losses(solution.D, H)
    worse = ~(after + damping.unsqueeze(-1) * solution.D.square().sum(-2) < damped)
    solution.codes.copy_(torch.where(worse.unsqueeze(-2), codes, solution.codes))
    solution.scales.copy_(torch.where(worse.unsqueeze(-2), scales, solution.scales))
    return torch.where(worse, before, after)
