"""GPTQ: the loop over columns.

    for every column batch i1..i2, in solving order:
        B = W[:, i1:i2] with the feedback of all columns before i1
        for every column j of the batch:
            Q_j = nearest level · scale
            E_j = (B_j - Q_j) / U_jj
            B_j+1: -= E_j U_j,j+1:

That is Algorithm 1 of the paper. Two things are computed differently, with the same result: columns that are
not due yet are left alone and get all their feedback in one matmul when their batch begins
(`factor.columns_with_feedback`), and a batch is cut into runs, of 16 columns or as many as the device takes
in one go (walk.py), so that most of its updates are small matmuls too.

Group parameters are either *dynamic*, computed from the current columns, feedback included, when the first
column of the group is due; or *static*, computed from W before the loop, which lets the solver take columns
in any order while groups stay in place. The original code computes them from stale columns when group_size is
smaller than a column batch. Here the column batch only changes the order in which sums are rounded; even that
can change a code at a rounding tie, and with it the feedback of all later columns.

    config                      order of columns        groups                    g_idx
    act_order "static"          falling H_kk            in place, static          k // group_size
    act_order "none"            as they are             in place, dynamic         k // group_size
    desc_act                    falling H_kk            follow the order, dynamic by solving order
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.gptq.batch import add_product_, diagonal_of, rows_of
from gptq_cli.gptq.factor import columns_with_feedback
from gptq_cli.gptq.grid import Grid
from gptq_cli.gptq.search import group_parameters
from gptq_cli.gptq.walk import SolveRun, Walk


def gptq(
    W: Tensor,  # (…, K, N) transposed, columns in solving order; becomes D = W - Q
    RT: Tensor,  # (…, K, K) factor of H in that order
    diagonal: Tensor,  # (…, K) H_kk in that order
    group_of: Tensor,  # (…, K) int64: the group of each column; or (K,) for all stages of a batch
    scales: Tensor,  # (…, G, N); filled in when dynamic
    zeros: Tensor,  # (…, G, N); filled in when dynamic
    group_size: int,
    grid: Grid,
    *,
    dynamic: bool,
    column_batch: int,
    walk: Walk,
) -> tuple[Tensor, Tensor]:  # codes uint8 (…, K, N) in solving order, Σ E² (…, N)
    """The loop of the paper. No value is read back from the device.

    Σ E² is the damped loss of every row, at no extra cost: D (H + λI) Dᵀ = E U (H + λI) Uᵀ Eᵀ = E Eᵀ. Where
    the feedback is rounded to bf16 it is off by about 1e-4 of itself, up or down.
    """
    K = W.shape[-2]
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    damped = W.new_zeros(*W.shape[:-2], W.shape[-1])
    for i1 in range(0, K, column_batch):
        i2 = min(i1 + column_batch, K)
        B, UT = columns_with_feedback(W, RT, i1, i2)
        # column j holds U_j,: / U_jj, so that E below stays in units of weights
        U = UT / diagonal_of(UT).unsqueeze(-2)
        weight = diagonal_of(UT).square().reciprocal_()
        E = torch.empty_like(B)
        s1 = i1
        while s1 < i2:
            s2 = min(s1 + walk.columns, i2)
            if dynamic:
                group = s1 // group_size
                end = min((group + 1) * group_size, K)
                s2 = min(s2, end)
                if s1 == group * group_size:
                    X = B[..., s1 - i1 : end - i1, :]
                    if end > i2:
                        X = columns_with_feedback(W, RT, s1, end)[0]
                    found = group_parameters(X, diagonal[..., s1:end], end - s1, grid)
                    scales[..., group, :], zeros[..., group, :] = found[0][..., 0, :], found[1][..., 0, :]
            run, due = slice(s1 - i1, s2 - i1), slice(s1, s2)
            walk.solve(
                SolveRun(
                    B=B[..., run, :], U=U[..., run, run], weight=weight[..., run],
                    S=rows_of(scales, group_of[..., due]), Z=rows_of(zeros, group_of[..., due]),
                    W=W[..., due, :], codes=codes[..., due, :], E=E[..., run, :], damped=damped,
                ),
                grid,
            )  # fmt: skip
            if s2 < i2:
                add_product_(B[..., s2 - i1 :, :], U[..., s2 - i1 :, run], E[..., run, :], alpha=-1)
            s1 = s2
    return codes, damped
