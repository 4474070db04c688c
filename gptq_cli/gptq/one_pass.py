"""What a number of bits would cost a linear: one pass of GPTQ over its columns, and no more.

The loss of a finished linear depends on the recipe (sweeps, refit, the goal). For comparing bits it is enough
to know how the loss of the first pass falls with them, and that is cheap to know: H is factorised once for
all of them, and GPTQ never mixes rows, so a part of the rows tells the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.batch import diagonal_of
from gptq_cli.gptq.factor import factorize_each
from gptq_cli.gptq.grid import Grid, round_to_nearest
from gptq_cli.gptq.inputs import refuse_unsolvable, stack_rows
from gptq_cli.gptq.losses import row_losses
from gptq_cli.gptq.matmul import exact_matmul
from gptq_cli.gptq.rounding import column_order, group_width, solve_columns
from gptq_cli.gptq.search import group_parameters
from gptq_cli.gptq.walk_choice import walk_on


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """H with its factor, for one pass after another."""

    H: Tensor
    """(K, K) mean of x xᵀ."""
    order: Tensor
    """(K,) the column that is solved i-th."""
    RT: Tensor | None
    """(K, K) the factor of the damped H; None where none works, or H is all zero: then codes are rounded to
    nearest."""

    @classmethod
    def of(cls, H: Tensor, config: QuantizeConfig) -> Factored:  # (K, K) fp32
        """Factorise H, with the damping and the order of `config`."""
        order = column_order(H, config)
        with exact_matmul():
            RT, (factor,) = factorize_each(H.unsqueeze(0), order, config.damp_percent)
        return cls(H, order, None if factor.RT is None else RT[0])

    @exact_matmul()
    def error(
        self,
        weights: Sequence[Tensor],  # (N_i, K) each
        config: QuantizeConfig,
    ) -> Tensor:  # (ΣN, K)
        """W - Q of the linears, stacked, for the bits and groups of `config`.

        Raises `NonFinite` for NaN or infinity in H or in a weight, and for weights whose scales float16
        cannot hold.
        """
        grid, g = Grid.of(config), group_width(self.H.shape[-1], config)
        refuse_unsolvable([list(weights)], self.H.unsqueeze(0), grid)
        W = stack_rows([weights], self.H)
        if self.RT is None:
            return round_to_nearest(W, *group_parameters(W, diagonal_of(self.H), g, grid), g, grid).D.T
        walk = walk_on(self.H.device, self.H.dtype)
        return solve_columns(W, self.H, self.order, self.RT, g, grid, config, walk)[0].D.T

    @exact_matmul()
    def loss(
        self,
        error: Tensor,  # (N, K)
        weights: Sequence[Tensor],  # (N_i, K) each
    ) -> float:
        """tr(E H Eᵀ) / tr(W H Wᵀ) of all rows; 0 where the output is 0."""
        lost = float(row_losses(error.T, self.H).sum())
        energy = float(row_losses(stack_rows([weights], self.H), self.H).sum())
        return max(lost, 0.0) / energy if energy > 0 else 0.0


def some_rows(weight: Tensor, most: int) -> Tensor:  # (N, K) -> (at most `most`, K)
    """Rows of a weight, evenly spread."""
    return weight[torch.arange(0, weight.shape[0], -(-weight.shape[0] // most), device=weight.device)]
