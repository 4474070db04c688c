"""From weights to the scale and the zero of every group.

`minmax`   the range of the group, nothing clipped.
`mse`      the original code's search: 80 shrunken ranges, error |w - q|^2.4.
`hessian`  the default. Minimises √H_kk · |w - q|^2.5: an input column with more energy counts for more, but
           less than its full share, because the solver will move much of its error to later columns.
           Symmetric groups use the full signed range: the scale's sign is such that the extreme weight
           becomes the level -2^(bits-1), which has no positive counterpart. A coarse grid of clipped ranges
           is followed by two halvings around the best (asymmetric: three, each end separately).

Sources: the clip search is Frantar et al.'s `--mse`; the signed full range is auto-round's
(docs/full_range_sym.md); weighting by input energy is llm-compressor's imatrix observer. Exponents and grids
were chosen on SmolLM2-135M against held-out Hessians: 16 evaluations come within 0.1 % of the layer error of
60 (symmetric), 18 within 0.1 % of 169 (asymmetric).

Errors are computed with the fp16 scale that would be stored. Of equal candidates the first wins, so that the
result does not depend on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.gptq.grid import Grid, minmax_parameters, round_scale_to_fp16, zero_point

_CHUNK_VALUES = 1 << 18
"""Weights processed at once: two fp32 buffers of this size stay in a core's cache."""
_DEVICE_CHUNK_VALUES = 1 << 24
"""The same for a device that is launched and has the bandwidth: enough that launching costs little."""


def group_parameters(
    W: Tensor,  # (…, K, N) transposed weights; groups are runs of rows
    diagonal: Tensor,  # (…, K) H_kk of these columns
    group_size: int,  # columns of a group; the last may be short
    grid: Grid,
) -> tuple[Tensor, Tensor]:  # scales, zeros (…, G, N), in W's dtype: scales are fp16 values, zeros integers
    """Scale and zero of every group of W, independent of how many groups are computed at once."""
    K, N = W.shape[-2:]
    weight = diagonal.clamp(min=0).sqrt()
    full = K // group_size * group_size
    parts = [(0, full, group_size)] if full else []
    if full < K:
        parts.append((full, K, K - full))
    scales = W.new_empty(*W.shape[:-2], -(-K // group_size), N)
    zeros = torch.empty_like(scales)
    for a, b, size in parts:
        X = W[..., a:b, :].reshape(-1, size, N)  # of all stages: to the search a group is a group
        c = weight[..., a:b].reshape(-1, 1, size)
        found = W.new_empty(2, X.shape[0], N)
        chunk = _CHUNK_VALUES if W.device.type == "cpu" else _DEVICE_CHUNK_VALUES
        wide = max(1, chunk // size)
        for n in range(0, N, wide):
            tall = max(1, chunk // (size * min(wide, N)))
            for g in range(0, X.shape[0], tall):
                scale, zero = _find(X[g : g + tall, :, n : n + wide], c[g : g + tall], grid)
                found[0, g : g + tall, n : n + wide], found[1, g : g + tall, n : n + wide] = scale, zero
        rows = slice(a // group_size, -(-b // group_size))
        scales[..., rows, :], zeros[..., rows, :] = found.view(2, *W.shape[:-2], -1, N)
    return scales, zeros


def _find(X: Tensor, c: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    if grid.search == "minmax":
        return minmax_parameters(X, grid)
    if grid.search == "mse":
        return _shrunken_ranges(X, grid)
    # in a group whose inputs carry no energy at all, every weight counts the same
    mean = c.mean(2, keepdim=True)
    weight = torch.where(mean > 0, c / torch.where(mean > 0, mean, torch.ones_like(mean)), 1.0)
    return _signed_ranges(X, weight, grid) if grid.sym else _two_ended_ranges(X, weight, grid)


class _Best:
    """The best candidate of every group so far, and its clipping factors (of either end)."""

    def __init__(self, X: Tensor, weight: Tensor | None, power: float, grid: Grid) -> None:
        self._X, self._weight, self._power, self._grid = X, weight, power, grid
        self._t, self._u = torch.empty_like(X), torch.empty_like(X)
        shape = (X.shape[0], X.shape[2])
        self.error = X.new_full(shape, torch.inf)
        self.scale, self.zero = X.new_ones(shape), X.new_full(shape, grid.half)
        self.low, self.high = X.new_ones(shape), X.new_ones(shape)

    def offer(self, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor | None = None) -> None:
        """Take the candidate wherever its weighted error is smaller."""
        error = self._error(scale, zero)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.low = torch.where(better, low, self.low)
        if not self._grid.sym:
            self.zero = torch.where(better, zero, self.zero)
        if high is not None:
            self.high = torch.where(better, high, self.high)

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:  # (G, N)
        """Σ weight · |w - q|^power, as |scale|^power · Σ weight · |w / scale - level|^power."""
        s, t, u = scale[:, None], self._t, self._u
        self._grid.levels(self._X, s, zero[:, None], out=u)
        torch.div(self._X, s, out=t).sub_(u).abs_()
        if self._power == 2.5:
            torch.sqrt(t, out=u).mul_(t).mul_(t)
        else:
            torch.pow(t, self._power, out=u)
        total = u.sum(1) if self._weight is None else torch.matmul(self._weight, u)[:, 0]
        return total * scale.abs() ** self._power


def _signed_ranges(X: Tensor, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Symmetric: scale = ± clip · max|w| / 2^(bits-1)."""
    high, low = X.amax(1), X.amin(1)
    reach = torch.maximum(high, -low) / grid.half
    sign = torch.where(-low >= high, 1.0, -1.0).to(X.dtype)
    best = _Best(X, weight, 2.5, grid)
    zero = best.zero
    narrow, spread = (0.65, 0.07) if grid.bits >= 4 else (0.5, 0.1)
    clips = [1.0 - i * spread for i in range(round((1.0 - narrow) / spread) + 1)]
    signs = [sign, -sign] if grid.bits <= 3 else [sign]
    if grid.positive_scales:
        # the positive end has one level fewer: start where it just fits
        clips, signs = [grid.half / (grid.half - 1), *clips], [torch.ones_like(sign)]
    for clip in clips:
        for side in signs:
            best.offer(round_scale_to_fp16(reach * clip * side), zero, clip * side)
    for step in (spread / 2, spread / 4):
        centre = best.low
        for factor in (1 + step, 1 - step):
            clip_here = centre * factor
            best.offer(round_scale_to_fp16(reach * clip_here), zero, clip_here)
    return best.scale, best.zero


def _two_ended_ranges(X: Tensor, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Asymmetric: scale = (clip_high · max - clip_low · min) / top, the zero rounded to a code."""
    low, high = X.amin(1).clamp(max=0), X.amax(1).clamp(min=0)
    best = _Best(X, weight, 2.5, grid)

    def offer(clip_low: Tensor, clip_high: Tensor) -> None:
        scale = round_scale_to_fp16((high * clip_high - low * clip_low) / grid.top)
        best.offer(scale, zero_point(low * clip_low, scale, grid), clip_low, clip_high)

    narrow = 0.6 if grid.bits >= 3 else 0.5
    for i in range(6):
        clip = torch.full_like(low, 1.0 - i * (1.0 - narrow) / 5)
        offer(clip, clip)
    for step in (0.12, 0.06, 0.03):
        for factor in (1 + step, 1 - step):
            offer(best.low * factor, best.high)
        for factor in (1 + step, 1 - step):
            offer(best.low, best.high * factor)
    return best.scale, best.zero


def _shrunken_ranges(X: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The original code's search: ranges shrunk by 0 … 79 hundredths, both ends alike, error |w - q|^2.4."""
    low, high = X.amin(1).clamp(max=0), X.amax(1).clamp(min=0)
    span = torch.maximum(high, -low) * 2 if grid.sym else high - low
    best = _Best(X, None, 2.4, grid)
    for i in range(80):
        clip = torch.full_like(span, 1.0 - i / 100)
        scale = round_scale_to_fp16(span * clip / grid.top)
        zero = best.zero if grid.sym else zero_point(low * clip, scale, grid)
        best.offer(scale, zero, clip)
    return best.scale, best.zero
