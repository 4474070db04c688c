"""The solver's result: one linear as codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from gptq_cli.gptq.factor import Factor
from gptq_cli.gptq.grid import Solution
from gptq_cli.results.run import Method


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedLinear:
    """A linear as integers: W[n, k] ≈ (codes[n, k] - zeros[n, g]) · scales[n, g] with g = g_idx[k]."""

    codes: Tensor
    """uint8 (N, K), columns in their original order."""
    scales: Tensor
    """fp16 (N, groups); negative ones are legal unless `positive_scales` was set."""
    zeros: Tensor
    """uint8 (N, groups): the code that means 0."""
    g_idx: Tensor
    """int32 (K,): the group of each original column; k // group_size unless `desc_act`."""
    loss: float
    """tr(E H Eᵀ) / tr(W H Wᵀ), H undamped: the relative error of the output. E = W - Q, or E = W' - Q with a
    goal W' (goal.py)."""
    rtn_loss: float
    """The same for plain round-to-nearest: min/max scales, trivial groups, the same bits."""
    damp_percent: float
    """The damping that worked, or the last one tried when none did."""
    attempts: int
    """Factorisations tried; 0 when H was all zero and there was nothing to factorise."""
    method: Method
    """"rtn" when no damping made H positive definite."""
    energy: float = 0.0
    """tr(W H Wᵀ), which the losses are relative to; with it those of a linear's pieces can be added."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # (N, K)
        """The weights that a reader of the checkpoint computes, rounded once, to `dtype`."""
        return dequantized(self.codes, self.scales, self.zeros, self.g_idx, dtype)


def dequantized(
    codes: Tensor,  # uint8 (N, K)
    scales: Tensor,  # fp16 (N, groups)
    zeros: Tensor,  # uint8 (N, groups)
    g_idx: Tensor,  # int32 (K,)
    dtype: torch.dtype,
) -> Tensor:  # (N, K)
    """(codes - zeros) · scales in float32, rounded once, to `dtype`."""
    g = g_idx.long()
    levels = codes.to(torch.float32) - zeros.to(torch.float32)[:, g]
    return (levels * scales.to(torch.float32)[:, g]).to(dtype)


def cut_stages(
    solution: Solution,  # of stages with R = ΣN rows each
    rows: Sequence[int],  # N of a stage's linears
    factors: Sequence[Factor],  # of each stage
    losses: Sequence[float],  # of every linear, stage after stage
    rtn_losses: Sequence[float],
    energies: Sequence[float],
    method: Method,
) -> list[list[QuantizedLinear]]:
    """The linears of every stage, cut from what was solved together; each has memory of its own."""
    K, R = solution.codes.shape[-2:]
    groups = torch.arange(K, dtype=torch.int32, device=solution.codes.device) // solution.group_size
    columns = solution.columns.expand(len(factors), K)
    shape = (len(factors), -1, R)
    parts = zip(
        (part for X in solution.codes.view(shape) for part in torch.split(X, list(rows), 1)),
        (part for X in solution.scales.view(shape) for part in torch.split(X, list(rows), 1)),
        (part for X in solution.zeros.view(shape) for part in torch.split(X, list(rows), 1)),
        losses,
        rtn_losses,
        energies,
        strict=True,
    )
    stages: list[list[QuantizedLinear]] = []
    for factor, order in zip(factors, columns, strict=True):
        g_idx = torch.empty_like(groups)
        g_idx[order] = groups
        stages.append(
            [
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
                    energy=max(energy, 0.0),
                )
                for codes, scales, zeros, loss, rtn_loss, energy in islice(parts, len(rows))
            ]
        )
    return stages
