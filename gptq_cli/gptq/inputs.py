"""What the solver is given: refused where it cannot be solved, and its rows stacked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gptq_cli.errors import NonFinite, WeightTooLarge
from gptq_cli.gptq.grid import FP16_MAX, Grid


def refuse_unsolvable(
    stages: Sequence[Sequence[Tensor]],  # per stage its linears' weights (N_i, K)
    H: Tensor,  # (E, K, K) of each stage
    grid: Grid,
) -> None:
    """Raise `NonFinite` for NaN, infinity, and weights whose scales float16 cannot hold; `ValueError` for
    shapes that do not match. One read from the device, however many they are."""
    if H.ndim != 3 or H.shape[1] != H.shape[2]:
        raise ValueError(f"H has shape {tuple(H.shape[1:])}; expected a square matrix")
    weights = [weight for stage in stages for weight in stage]
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != H.shape[1]:
            raise ValueError(f"a weight has shape {tuple(weight.shape)}; H has {H.shape[1]} features")
    # no comprehension: its frame would keep H alive where this runs out of memory
    most, *reached = torch.stack(list(map(partial(_largest, like=H), (H, *weights)))).tolist()
    if not most < torch.inf:
        raise NonFinite(
            "the Hessian holds NaN or infinity", hint="an activation overflowed: try --dtype bfloat16"
        )
    for largest in reached:
        if not largest < torch.inf:
            raise NonFinite("the weight holds NaN or infinity")
        if largest / grid.half > FP16_MAX:
            raise WeightTooLarge(
                f"the weight reaches {largest:.3g}: its scales would be infinite in float16, "
                f"which ends at {FP16_MAX:.0f}",
                reached=largest,
            )


def _largest(X: Tensor, like: Tensor) -> Tensor:
    """The largest magnitude, on the device of `like` and in its dtype; NaN where there is one."""
    return torch.stack(torch.aminmax(X)).abs().max().to(like.device, like.dtype)


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
