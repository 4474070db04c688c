"""From a finished checkpoint to a better one with the same codes: what is stored beside them, by gradient.

GPTQ solves one linear at a time, for its own output or the dense model's. What counts is what the whole model
says: errors of different blocks can cancel, and only a loss at the end sees that. With all codes fixed,
W[n, k] = L[n, k] · s[g(k), n] (levels times the scale of their group) is smooth in s, and so is the model in
its norms' gains and its biases. They are tuned on

    loss = mean over tokens of KL(dense ‖ quantized)  of the logits, in nats

A tensor moves by a part of its size, v = v₀ + size ⊙ δ, and Adam works on δ: a scale by a part of itself, the
numbers of a vector by a part of their root mean square. The forward always runs on the values as a checkpoint
stores them (scales in fp16), the gradient passes the rounding straight through.

Sources: EfficientQAT (arXiv 2407.11062), whose second phase trains the scales of a whole model; Adam
(1412.6980).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gptq_cli.gptq.grid import round_scale_to_fp16
from gptq_cli.gptq.matmul import exact_matmul

_BETAS, _EPSILON = (0.9, 0.99), 1e-12
FARTHEST = 0.5
"""How far a number may move, in its size: a scale keeps its sign."""
RATE = 1.2e-2
"""So much of its size a number moves in a step, times 2^-bits: as far as the errors are large."""
WARM_UP = 0.1
"""The part of the steps in which the rate rises; then it falls to 0 along a cosine."""
PARTS = (1.0, 0.5)
"""How much of the way is tried on held-out samples."""
LEAST_GAIN = 1e-3
"""A loss that falls by less than this part of itself is not worth other values."""


class Moving:
    """A tensor that is tuned: where it began, how far it is from there, and Adam's two moments."""

    def __init__(self, start: Tensor, size: Tensor, bits: int, *, scale: bool = False) -> None:
        """`start`: as it is stored. `size`: of its numbers, broadcast to its shape. `bits`: of the codes
        beside it. `scale`: it holds the scales of groups, none of which may become 0."""
        self.start, self._size, self._scale = start, size.float(), scale
        self._rate = RATE * 2.0**-bits
        self._delta, self._m, self._v = (torch.zeros_like(start, dtype=torch.float32) for _ in range(3))
        self._steps = 0

    @classmethod
    def scales(cls, start: Tensor, bits: int) -> Moving:
        """Those of a linear's groups: each moves by a part of itself."""
        return cls(start, start, bits, scale=True)

    @classmethod
    def vector(cls, start: Tensor, bits: int) -> Moving:
        """A gain or a bias: its numbers move by a part of their root mean square."""
        return cls(start, start.float().square().mean().sqrt(), bits)

    def value(self, part: float = 1.0) -> Tensor:
        """As it would be stored, `part` of the way from where it began."""
        if part == 0.0:
            return self.start
        moved = self.start.float() + part * self._size * self._delta
        return (round_scale_to_fp16(moved) if self._scale else moved).to(self.start.dtype)

    def step(self, gradient: Tensor, rate: float) -> None:
        """One step of Adam, from the gradient of the loss with respect to the tensor; `rate`: as a part of
        the highest. A gradient that is not finite counts as none."""
        gradient = gradient.float() * self._size
        self._steps += 1
        (b1, b2), t = _BETAS, self._steps
        finite = gradient.isfinite().all()
        gradient = torch.where(finite, gradient, 0.0)
        self._m.mul_(b1).add_(gradient, alpha=1 - b1)
        self._v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        size = (self._v / (1 - b2**t)).sqrt_().add_(_EPSILON)
        self._delta.addcdiv_(self._m / (1 - b1**t), size, value=-rate * self._rate).clamp_(
            -FARTHEST, FARTHEST
        )


def scale_gradient(
    gradient: Tensor,  # (N, K) of the loss with respect to the weights
    codes: Tensor,  # uint8 (N, K)
    zeros: Tensor,  # uint8 (N, groups)
    g_idx: Tensor,  # int32 (K,)
) -> Tensor:  # (groups, N)
    """The same with respect to the scales: d s[g, n] = Σ over k in g of dW[n, k] · L[n, k]."""
    g = g_idx.long()
    levels = codes.float() - zeros.float()[:, g]
    # a product with zeros and ones, because sums by index are not deterministic on every device
    of_group = torch.zeros(zeros.shape[1], len(g), device=g.device).scatter_(0, g[None], 1.0)
    with exact_matmul():
        return of_group @ levels.mul_(gradient).T


def divergence(
    logits: Tensor,  # (tokens, V) of the quantized model
    goal: Tensor,  # (tokens, V) of the dense one
) -> Tensor:
    """KL(dense ‖ quantized) in nats, summed over tokens."""
    p, q = (torch.log_softmax(x.float(), -1) for x in (goal, logits))
    return (p.exp() * (p - q)).sum()


def rate_at(step: int, steps: int) -> float:
    """The learning rate of step number `step` (from 0), as a part of the highest."""
    warm = max(1, math.ceil(WARM_UP * steps))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def best_part(
    loss: Callable[[float], float],  # part of the way -> held-out loss
    before: float,  # loss(0)
) -> tuple[float, float]:  # the part that loses least, and its loss
    """How much of the way to go; 0 where all of it loses more than staying. A loss that is not finite loses
    more."""
    tried = ((loss(part), part) for part in PARTS)
    better = [one for one in tried if one[0] < before * (1 - LEAST_GAIN)]  # NaN is not
    least, part = min(better, default=(before, 0.0))
    return part, least
