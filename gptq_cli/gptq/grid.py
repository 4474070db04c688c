"""What a code can express: the levels of a group, scales that survive float16, and round-to-nearest.

A weight is stored as code · scale: w ≈ (code - zero) · scale, code in 0 … 2^bits - 1. Call code - zero its
level. Symmetric groups have zero = 2^(bits-1), so 4 bits hold the levels -8 … 7: one more below than above.
A negative scale turns that around, which is why signed scales use the full range (search.py).

Two rules make these the numbers that a reader will compute.

- Scales are stored as fp16, so a scale is rounded to fp16 *before* anything is rounded with it
  (`round_scale_to_fp16`).
- There is one division, w / scale. Multiplying by 1 / scale instead changes codes at rounding ties, and with
  min/max scales the largest weight of every group is exactly at a tie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig, ScaleSearch

FP16_MAX = 65504.0
FP16_MIN = 2.0**-24
"""The smallest fp16 above zero. It is subnormal: scales this small are coarse, and `round_scale_to_fp16` has
every later step work with the coarse value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which levels there are, and how a group's scale is found."""

    bits: int
    sym: bool
    positive_scales: bool
    search: ScaleSearch

    @classmethod
    def of(cls, config: QuantizeConfig) -> Grid:
        """The grid that a configuration asks for."""
        return cls(
            bits=config.bits,
            sym=config.sym,
            positive_scales=config.positive_scales,
            search=config.scale_search,
        )

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def half(self) -> int:
        """The code that means 0 in a symmetric group."""
        return int(2 ** (self.bits - 1))

    def levels(
        self,
        W: Tensor,  # any shape
        scale: Tensor,  # broadcasts against W
        zero: Tensor,  # broadcasts against W
        out: Tensor | None = None,
    ) -> Tensor:
        """The nearest level of every weight: clamp(round(w / scale), -zero, top - zero)."""
        return self.clamp_(torch.div(W, scale, out=out).round_(), zero)

    def clamp_(self, L: Tensor, zero: Tensor) -> Tensor:
        """Levels into their bounds, in place: numbers when symmetric, a pair for every row otherwise."""
        if self.sym:
            return L.clamp_(-self.half, self.half - 1)
        return L.clamp_(-zero, self.top - zero)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """Stacked linears as integers, with the remaining error; all tensors transposed; `…`: see batch.py.

    W = (codes - zeros) · scales + D. Columns are in their original order. `columns` says which of them make
    up group i: columns[i·group_size : (i+1)·group_size].
    """

    codes: Tensor
    """uint8 (…, K, N)."""
    D: Tensor
    """(…, K, N): W - Q."""
    scales: Tensor
    """(…, G, N), fp16 values in the dtype of the solve."""
    zeros: Tensor
    """(…, G, N), integers in the dtype of the solve."""
    columns: Tensor
    """(…, K) int64, or (K,) where all entries of a batch have the same."""
    group_size: int
    grid: Grid


def round_scale_to_fp16(scale: Tensor) -> Tensor:
    """`scale` as the checkpoint will hold it: rounded to fp16, never 0 and never infinite.

    0 (a group of zeros) becomes 1. A scale that is too small becomes the smallest fp16, one that is too large
    the largest, with its sign; `quantize_linears` refuses weights large enough for the latter to matter.
    """
    smallest = torch.where(scale < 0, -FP16_MIN, FP16_MIN).to(scale.dtype)
    rounded = scale.clamp(-FP16_MAX, FP16_MAX).to(torch.float16).to(scale.dtype)
    rounded = torch.where(rounded == 0, smallest, rounded)
    return torch.where(scale == 0, torch.ones_like(scale), rounded)


def minmax_parameters(
    X: Tensor,  # (G, g, N) groups of columns
    grid: Grid,
) -> tuple[Tensor, Tensor]:  # scale, zero (G, N)
    """The scale and the zero that just cover a group, as in the original code: no search."""
    low, high = X.amin(1).clamp(max=0), X.amax(1).clamp(min=0)
    if grid.sym:
        scale = round_scale_to_fp16(torch.maximum(high, -low) * 2 / grid.top)
        return scale, torch.full_like(scale, grid.half)
    scale = round_scale_to_fp16((high - low) / grid.top)
    return scale, zero_point(low, scale, grid)


def zero_point(low: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The code for 0 when the smallest weight has code 0: round(-low / scale), clamped to the codes."""
    return torch.round(-low / scale).clamp_(0, grid.top)


def round_to_nearest(
    W: Tensor,  # (…, K, N) transposed
    scales: Tensor,  # (…, G, N)
    zeros: Tensor,  # (…, G, N)
    group_size: int,  # columns of a group; the last may be short
    grid: Grid,
) -> Solution:
    """Every weight to its nearest level, no feedback: the baseline, and what a fallback writes."""
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    D = torch.empty_like(W)
    for group, a in enumerate(range(0, W.shape[-2], group_size)):
        b = min(a + group_size, W.shape[-2])
        scale, zero = scales[..., group, None, :], zeros[..., group, None, :]
        L = grid.levels(W[..., a:b, :], scale, zero)
        torch.addcmul(W[..., a:b, :], L, scale, value=-1, out=D[..., a:b, :])
        codes[..., a:b, :] = L.add_(zero)
    return Solution(
        codes=codes,
        D=D,
        scales=scales,
        zeros=zeros,
        group_size=group_size,
        grid=grid,
        columns=torch.arange(W.shape[-2], device=W.device),
    )
