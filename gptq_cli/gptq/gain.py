"""What happens to the output of a linear on its way into a sum.

The output y = W x of the last linear of an attention or an MLP is added to the residual stream: as it is,
times a number (Granite, MiniCPM), or normed first (Gemma 2 and 3, OLMo 2), γ ⊙ y / rms(y). All of these are

    z = s · γ ⊙ y,    1/s² = c · mean(y²) + d

with one number s per token and one γ per row: c = 0 where the output is scaled, d = c · ε where it is normed.
With s known, z is linear in W again. An error of y_n is an error of s · γ_n as much in z. So a linear is
solved on inputs x̃ = s · x, which count a token for what the norm leaves of it; γ_n is common to a whole row,
whose codes do not depend on it. To make up for the residual's error r_dense - r (`gptq.goal`), row n has to
put out (r_dense - r)_n / γ_n more.

What the module between is called, and how it is written, does not matter: `find_gain` is told y and z of some
tokens, and says whether they are related like this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gptq_cli.gptq.matmul import fast_matmul, fast_matmul_supported

TOLERANCE = 0.02
"""Of z that the formula may miss, as a norm: bf16 rounds to 2⁻⁹, a norm that takes a mean off misses more."""
_TURNS, _FIRST_LOOK, _FAR_OFF = 40, 4, 0.3
_LARGEST = 64.0
"""s of a token: as large as float16 inputs can bear, and more than tokens of real text differ."""
_LEAST = 0.01
"""Of the largest γ: rows below are not asked to make up for anything, which would take huge weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Gain:
    """z = s · γ ⊙ y; s is 1 on average over the tokens that it was found on."""

    gamma: Tensor
    """(N,) float32."""
    c: float
    d: float

    @property
    def inverse(self) -> Tensor:  # (N,)
        """1 / γ_n; 0 for rows of which next to nothing arrives, which cannot make up for anything."""
        enough = self.gamma.abs() > _LEAST * self.gamma.abs().max()
        return torch.where(enough, 1 / torch.where(enough, self.gamma, 1.0), 0.0)

    def of_tokens(self, y: Tensor) -> Tensor:  # (..., N) -> s (..., 1), float32
        """s of every token, from the output of the linear; bounded, for tokens that are next to nothing."""
        power = y.float().square().mean(-1, keepdim=True)
        return power.mul_(self.c).add_(self.d).clamp_(min=_LARGEST**-2).rsqrt_()


def find_gain(
    y: Tensor,  # (T, N) what the linear put out
    z: Tensor,  # (T, N) what was added
) -> Gain | None:
    """The gain between `y` and `z`; None where z is not s · γ ⊙ y.

    s and γ are the rank-one factors of z/y, weighted with y², found by turns (each is the least squares
    solution given the other); c and d the line through 1/s² with the smallest relative error. One token says
    nothing.
    """
    if y.shape != z.shape or y.shape[0] < 2 or y.shape[1] < 2:
        return None
    device = y.device
    y, z = y.cpu().double(), z.cpu().double()
    power, total = y.square().mean(1), z.square().sum()
    if not (torch.isfinite(power).all() and torch.isfinite(total) and power.min() > 0 and total > 0):
        return None
    s = (z.square().mean(1) / power).sqrt()[:, None]
    gamma = y.new_ones(y.shape[1])
    for turn in range(_TURNS):
        if turn == _FIRST_LOOK and (z - s * gamma * y).square().sum() > _FAR_OFF**2 * total:
            return None
        sy = s * y
        gamma = _ratio((z * sy).sum(0), sy.square().sum(0))
        s = _ratio((z * y * gamma).sum(1, keepdim=True), (y * gamma).square().sum(1, keepdim=True))
    scale = s.mean()
    s, gamma = s / scale, gamma * scale
    if (s <= 0).any() or (z - s * gamma * y).square().sum() > TOLERANCE**2 * total:
        return None
    c, d = _line(power, s[:, 0].square().reciprocal())
    found = Gain(gamma.float().to(device), c, d)
    if c * float(power.min()) + d <= 0:
        return None
    missed = z - found.of_tokens(y).double() * gamma * y
    return found if missed.square().sum() <= TOLERANCE**2 * total else None


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(a))


def _line(x: Tensor, q: Tensor) -> tuple[float, float]:
    """c, d ≥ 0 that minimise Σ ((c·x + d) / q - 1)²; one of them 0 where that is as good."""
    a, b = x / q, 1 / q
    aa, ab, bb = (a * a).sum(), (a * b).sum(), (b * b).sum()
    found = [(0.0, float(b.sum() / bb)), (float(a.sum() / aa), 0.0)]
    determinant = aa * bb - ab * ab
    if determinant > 1e-9 * aa * bb:
        c = float((a.sum() * bb - b.sum() * ab) / determinant)
        d = float((b.sum() * aa - a.sum() * ab) / determinant)
        if c >= 0 and d >= 0:
            found.append((c, d))

    def missed(line: tuple[float, float]) -> float:
        return float((line[0] * a + line[1] * b - 1).square().mean().sqrt())

    return next((line for line in found if missed(line) < TOLERANCE / 4), min(found, key=missed))


def outputs_of(x: Tensor, W: Tensor) -> Tensor:  # (..., N), in x's dtype
    """x Wᵀ, in bf16 where the device is fast in it, else in fp32 and rounded once."""
    if fast_matmul_supported(x.dtype, x.device.type):
        return functional.linear(x, W.to(x.dtype))
    with fast_matmul():
        return functional.linear(x.float(), W.float()).to(x.dtype)
