"""The losses that are reported: how a linear's error changes its output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.gptq.batch import add_product_, diagonal_of
from gptq_cli.gptq.grid import Grid, round_to_nearest
from gptq_cli.gptq.matmul import fast_matmul
from gptq_cli.gptq.search import group_parameters
from gptq_cli.gptq.triangle import block_rows


def row_losses(
    D: Tensor,  # (…, K, N) transposed: the error of every weight
    H: Tensor,  # (…, K, K)
) -> Tensor:  # (…, N)
    """The diagonal of Dᵀ H D: the mean squared error of every output of the linear.

    H is symmetric, so its upper half is counted twice instead of multiplied: K²·N multiply-adds.
    """
    total = D.new_zeros(*D.shape[:-2], D.shape[-1])
    for a, b in block_rows(D.shape[-2]):
        P = H[..., a:b, a:b] @ D[..., a:b, :]
        if a:
            add_product_(P, H[..., a:b, :a], D[..., :a, :], alpha=2)
        total += P.mul_(D[..., a:b, :]).sum(-2)
    return total


def baseline_losses(
    W: Tensor, goal: Tensor | None, H: Tensor, g: int, grid: Grid
) -> tuple[Tensor, Tensor]:  # (…, N), (…, N)
    """Row losses of W itself, and of round-to-nearest with min/max scales.

    Round-to-nearest rounds W, because it does not know the goal; its loss is measured against the goal.
    """
    plain = Grid(bits=grid.bits, sym=grid.sym, positive_scales=False, search="minmax")
    with fast_matmul():
        energy = row_losses(W, H)
        scales, zeros = group_parameters(W, diagonal_of(H), g, plain)
        D = round_to_nearest(W, scales, zeros, g, plain).D
        return energy, row_losses(D if goal is None else D.add_(goal).sub_(W), H)


def relative_losses(
    errors: Sequence[Tensor],  # (N,) each: row losses of W - Q, for several Q
    energy: Tensor,  # (N,) row losses of W
    rows: Sequence[int],  # output features of each linear, stacked
) -> tuple[list[list[float]], list[float]]:
    """Σ error / Σ energy of every linear, for each of `errors`, and Σ energy; 0/0 is 0: a linear whose output
    is 0 loses nothing. One read from the device."""
    sums = [torch.stack([part.sum() for part in torch.split(X, list(rows))]) for X in (energy, *errors)]
    totals, *lost = torch.stack(sums).tolist()
    return [[_ratio(*pair) for pair in zip(one, totals, strict=True)] for one in lost], totals


def _ratio(lost: float, total: float) -> float:
    # rounding can leave a tiny negative number where the exact sum is 0
    lost, total = max(lost, 0.0), max(total, 0.0)
    return lost / total if total else (math.inf if lost else 0.0)
