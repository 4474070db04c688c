"""What the solver is given: refused where it cannot be solved, and its rows stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.errors import NonFinite
from gptq_cli.gptq.grid import FP16_MAX, Grid


def refuse_unsolvable(
    weights: Sequence[Tensor],  # (N_i, K) each, of one stage
    H: Tensor,  # (K, K)
    grid: Grid,
) -> None:
    """Raise `NonFinite` for NaN, infinity, and weights whose scales float16 cannot hold; `ValueError` for
    shapes that do not match."""
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


def stack_rows(
    stages: Sequence[Sequence[Tensor]],  # per stage its linears' weights (N_i, K): the same shapes in each
    H: Tensor,  # (…, K, K)
) -> Tensor:  # (…, K, ΣN) transposed, in H's dtype and on its device
    """The rows of a stage's linears side by side, for every stage."""
    K, rows = H.shape[-1], [weight.shape[0] for weight in stages[0]]
    W = H.new_empty(*H.shape[:-1], sum(rows))
    for whole, weights in zip(W.view(-1, K, sum(rows)), stages, strict=True):
        for part, weight in zip(torch.split(whole, rows, 1), weights, strict=True):
            part.copy_(weight.T)
    return W
