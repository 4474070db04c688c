"""What the quantized model's activations should be multiplied with: the asymmetric target.

By the time a linear is quantized, its input x comes from blocks that are quantized already. Plain GPTQ
minimises E‖W x - Q x‖², which keeps the errors that x brought along. The goal is the dense model's output
W x_dense, so minimise E‖W x_dense - Q x‖² instead. With H = E[x xᵀ], C = E[x_dense xᵀ] and D = C - H =
E[(x_dense - x) xᵀ] its best real-valued Q is W C H⁻¹ = W + W D H⁻¹, and for any Q the loss is that of
rounding this matrix, plus a constant. So the solver needs nothing new: it is given

    W' = W + α · W D (H + λI)⁻¹

instead of W. That is the target for linears whose output something reads. The output of the last linear of
an attention or an MLP is added to the residual stream, and the sum is read: there the goal is
r_dense + W x_dense where r + Q x will be. With B = E[(W (x_dense - x) + r_dense - r) xᵀ] in the place of W D
the same formula holds, and the linear corrects what earlier blocks did to the stream, as far as x predicts
it. Where the output is normed or scaled on its way into the sum, see gain.py.

D and B may be estimated from only some of the tokens in H. Their signal is small, and held-out tokens show
how much of it is real. With few tokens per column, or where most of the error is unrelated to x (a residual
changed by many blocks), the step fits noise. α < 1 shortens it; a larger λ turns it towards the directions in
which x has the most energy and noise the least weight. Neither has to be guessed: on held-out tokens the loss
is a parabola in α with a known minimum, and λ is raised from the solver's own value as long as that minimum
falls (choice.py).

Nothing in this keeps W' near W: to make up for a residual whose error is a thousand times larger than what
the linear puts out, its rows would have to grow as much, and with them the steps between their levels. So a
row moves by its own size at most (`bounded_step`).

Sources: Qronos (arXiv 2505.11695), GPTAQ (2504.02692), which apply the same correction column by column, and
LoaQ (2509.06297), which also counts the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.gptq.factor import Factor, factorize

FARTHEST = 1.0
"""So many times its size a row moves at most."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the stacked rows of a stage."""

    rows: slice
    lengths: tuple[int, ...]
    """Into which they are cut, so that each belongs to one linear."""


def asymmetric_step(
    B: Tensor,  # (N, K) = W D, or with the residual's error; see above
    H: Tensor,  # (K, K) mean of x xᵀ, undamped
    damp_percent: float,
) -> tuple[Tensor | None, float]:  # V (N, K) = B (H + λI)⁻¹, in H's dtype, and the damping used
    """The full step from W to the asymmetric target; None when no damping factorises H.

    Cost: one Cholesky and N·K² multiply-adds.
    """
    factor = step_factor(H, damp_percent)
    return full_step(B.to(H.dtype), factor), factor.damp_percent


def step_factor(H: Tensor, damp_percent: float) -> Factor:  # H (K, K)
    """The factor for a step: of H, its columns in their own order."""
    return factorize(H, torch.arange(H.shape[0], device=H.device), damp_percent)


def full_step(
    B: Tensor,  # (N, K)
    factor: Factor,  # of H + λI, its columns in their own order
) -> Tensor | None:  # V (N, K)
    """B (H + λI)⁻¹; None where no damping factorised H."""
    if factor.RT is None:
        return None
    # (H + λI)⁻¹ = R⁻ᵀ R⁻¹ and RT = Rᵀ is lower: two triangular solves from the right
    half = torch.linalg.solve_triangular(factor.RT, B, upper=False, left=False)
    V: Tensor = torch.linalg.solve_triangular(factor.RT.T, half, upper=True, left=False)
    return V


def bounded_step(
    V: Tensor,  # (N, K) the step; changed in place
    W: Tensor,  # (N, K)
) -> tuple[float, int]:  # ‖V‖ / ‖W‖ afterwards, and how many rows were shortened
    """Shorten rows of the step that are longer than `FARTHEST` times the row of W.

    A row of W that is shorter than the others (their root mean square) counts as long as these are: it may
    be all 0.
    """
    size = torch.linalg.vector_norm(W, dim=1)
    typical = size.square().mean().sqrt()
    limit, length = FARTHEST * torch.maximum(size, typical), torch.linalg.vector_norm(V, dim=1)
    too_long = length > limit
    V *= torch.where(too_long, limit / torch.where(too_long, length, 1.0), 1.0)[:, None]
    found = (torch.linalg.vector_norm(V), torch.linalg.vector_norm(W), too_long.sum())
    step, total, shortened = torch.stack([value.to(V.dtype) for value in found]).tolist()  # one read
    return step / total if total else 0.0, int(shortened)
