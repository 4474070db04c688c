"""From codes and scales to better ones: coordinate descent on the damped loss, one group after another.

With D = W - Q the damped loss of a row is f = Dᵀ (H + λI) D and G = (H + λI) D is minus half its slope. In
one pass over the groups, each in turn:

1. refit: with the group's levels l fixed, f is a parabola in the group's scale; its lowest point is
   s + (l·G) / (lᵀ H_gg l). The scale is rounded to fp16, and taken where f falls with the rounded one.
   (Closed form, one group at a time: the second stage of "Two-Stage Grid Optimization", arXiv 2602.02126.)
2. sweep: with the scale fixed, f is a parabola in every single weight; its lowest point is q + G_kk / H_kk,
   and the nearest level to it is the best code. Column after column, cyclically.
   (QuantEase, arXiv 2309.01885; CDQuant, arXiv 2406.17542.)

Both steps minimise exactly along one direction, so f never rises except by rounding; the caller compares the
losses of rows before and after. A pass costs one matmul with H (K²·N multiply-adds) and as many column steps
as the solve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.gptq.batch import (
    add_product_,
    add_rows_,
    columns_of,
    diagonal_of,
    rows_of,
    set_rows_,
)
from gptq_cli.gptq.grid import FP16_MAX, Grid, Solution
from gptq_cli.gptq.matmul import fast_matmul
from gptq_cli.gptq.walk import SweepRun, Walk


def refine_once(
    solution: Solution,  # changed in place
    H: Tensor,  # (…, K, K) undamped
    damping: Tensor,  # (…) λ
    *,
    sweep: bool,
    refit: bool,
    column_batch: int,
    walk: Walk,
) -> None:
    """One pass: every group's scale (`refit`), then its codes (`sweep`)."""
    K, g = H.shape[-1], solution.group_size
    width = max(column_batch // g, 1) * g
    for a in range(0, K, width):
        b = min(a + width, K)
        if b - a <= column_batch:
            _block(solution, H, damping, a, b, walk, sweep=sweep, refit=refit)
            continue
        if refit:
            _refit_wide_group(solution, H, damping, a, b, column_batch)
        for p in range(a, b, column_batch) if sweep else ():
            _block(solution, H, damping, p, min(p + column_batch, b), walk, sweep=True, refit=False)


def _slope(
    solution: Solution, H: Tensor, damping: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:  # G (…, n, N), H[index] (…, n, K)
    """G = (H + λI) D in the columns `index`."""
    rows = rows_of(H, index)
    with fast_matmul():
        G = rows @ solution.D
    return G.add_(rows_of(solution.D, index).mul_(damping[..., None, None])), rows


def _block(
    solution: Solution, H: Tensor, damping: Tensor, a: int, b: int, walk: Walk, *, sweep: bool, refit: bool
) -> None:
    """Columns a..b of the group order: complete groups, or a piece of one (then without refit)."""
    index = solution.columns[..., a:b]
    G, rows = _slope(solution, H, damping, index)
    Hb = columns_of(rows, index)
    diagonal_of(Hb).add_(damping[..., None])
    p = a
    while p < b:
        group = p // solution.group_size
        r = min((group + 1) * solution.group_size, b)
        here, later = slice(p - a, r - a), slice(p - a, b - a)
        columns = index[..., here]
        s, z = solution.scales[..., group, :], solution.zeros[..., group, :]
        L = rows_of(solution.codes, columns).to(G.dtype).sub_(z[..., None, :])
        before = L * s[..., None, :]
        if refit:
            bend = (L * (Hb[..., here, here] @ L)).sum(-2)
            step = _scale_step(s, (L * G[..., here, :]).sum(-2), bend)
            G[..., later, :] -= Hb[..., later, here] @ (L * step[..., None, :])
            s += step
        if sweep:
            _sweep(L, G[..., later, :], Hb[..., later, later], s, z, solution.grid, walk)
        add_rows_(solution.D, columns, before.addcmul_(L, s[..., None, :], value=-1))
        set_rows_(solution.codes, columns, L.add_(z[..., None, :]).to(torch.uint8))
        p = r


def _sweep(
    L: Tensor,  # (…, n, N) levels of the columns to go through; changed in place
    G: Tensor,  # (…, m, N) slope of these and the block's later columns; changed in place
    H: Tensor,  # (…, m, m) damped
    s: Tensor,  # (…, N)
    z: Tensor,  # (…, N)
    grid: Grid,
    walk: Walk,
) -> None:
    n = L.shape[-2]
    C = torch.empty_like(L)  # the change of every weight
    for s1 in range(0, n, walk.columns):
        s2 = min(s1 + walk.columns, n)
        run = slice(s1, s2)
        walk.sweep(
            SweepRun(L=L[..., run, :], G=G[..., run, :], H=H[..., run, run], s=s, z=z, C=C[..., run, :]), grid
        )
        add_product_(G[..., s2:, :], H[..., s2:, run], C[..., run, :], alpha=-1)


def _scale_step(s: Tensor, along: Tensor, curve: Tensor) -> Tensor:  # (…, N)
    """How far each scale moves: to the fp16 number nearest the parabola's lowest point, or not at all.

    Moving by t changes the loss by t²·curve - 2t·along. A scale keeps its sign and never becomes 0.
    """
    lowest = s + along / torch.where(curve > 0, curve, torch.ones_like(curve))
    rounded = lowest.clamp(-FP16_MAX, FP16_MAX).to(torch.float16).to(s.dtype)
    t = rounded - s
    falls = (t * t * curve - 2 * t * along < 0) & (rounded * s > 0)
    return torch.where(falls, t, torch.zeros_like(t))


def _refit_wide_group(
    solution: Solution, H: Tensor, damping: Tensor, a: int, b: int, column_batch: int
) -> None:
    """The refit of a group that is wider than a column batch: two matmuls with H instead of one."""
    index, group = solution.columns[..., a:b], a // solution.group_size
    s, z = solution.scales[..., group, :], solution.zeros[..., group, :]
    L = rows_of(solution.codes, index).to(H.dtype).sub_(z[..., None, :])
    along, curve = torch.zeros_like(s), torch.zeros_like(s)
    for p in range(0, b - a, column_batch):
        piece = slice(p, min(p + column_batch, b - a))
        G, rows = _slope(solution, H, damping, index[..., piece])
        here = L[..., piece, :]
        along += (here * G).sum(-2)
        HL = (columns_of(rows, index) @ L).addcmul_(here, damping[..., None, None])
        curve += (here * HL).sum(-2)
    step = _scale_step(s, along, curve)
    s += step
    add_rows_(solution.D, index, L.mul_(-step[..., None, :]))
