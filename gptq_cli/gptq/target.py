"""What the quantized model's activations should be multiplied with: the asymmetric target.

By the time a linear is quantized, its input x comes from blocks that are quantized already. Plain GPTQ
minimises E‖W x - Q x‖², which keeps the errors that x brought along. The goal is the dense model's output
W x_dense, so minimise E‖W x_dense - Q x‖² instead. With H = E[x xᵀ] and C = E[x_dense xᵀ] its best
real-valued Q is W C H⁻¹ = W + W (C - H) H⁻¹, and for any Q the loss is that of rounding this matrix, plus a
constant. So the solver needs nothing new: it is given

    W' = W + α · W (C - H) (H + λI)⁻¹

instead of W. Sources: Qronos (arXiv 2505.11695), LoaQ (2509.06297), GPTAQ (2504.02692), which apply the same
correction column by column. α = 1 trusts the calibration tokens fully; with few tokens a column the step
overfits, and α < 1 pays. How much less need not be guessed: on tokens that were not used for the step the
loss is a parabola in α, and `held_out_alpha` returns its lowest point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.gptq.factor import factorize
from gptq_cli.gptq.precision import exact_products, fast_products


def asymmetric_step(
    W: Tensor,  # (N, K)
    H: Tensor,  # (K, K) mean of x xᵀ, undamped
    C: Tensor,  # (K, K) mean of x_dense xᵀ
    damp_percent: float,
) -> Tensor | None:  # V (N, K) = W (C - H) (H + λI)⁻¹, in H's dtype; None when no damping factorises H
    """The full step from W to the asymmetric target. Cost: one Cholesky and 2·N·K² multiply-adds."""
    RT = factorize(H, torch.arange(H.shape[0], device=H.device), damp_percent).RT
    if RT is None:
        return None
    with exact_products():
        right = W.to(H.dtype) @ (C - H)
    # (H + λI)⁻¹ = R⁻ᵀ R⁻¹ and RT = Rᵀ is lower: two triangular solves from the right
    half = torch.linalg.solve_triangular(RT, right, upper=False, left=False)
    V: Tensor = torch.linalg.solve_triangular(RT.T, half, upper=True, left=False)
    return V


def asymmetric_target(
    W: Tensor,  # (N, K)
    H: Tensor,  # (K, K) mean of x xᵀ, undamped
    C: Tensor,  # (K, K) mean of x_dense xᵀ, from hessian.CrossMoment
    alpha: float,
    damp_percent: float,
) -> Tensor:  # (N, K) in H's dtype
    """W' = W + α · W (C - H) (H + λI)⁻¹, to be given to `quantize_linears` as a target.

    W itself when H cannot be factorised: a target is an improvement, never a reason to stop.
    """
    V = asymmetric_step(W, H, C, damp_percent) if alpha else None
    return W.to(H.dtype) if V is None else torch.add(W.to(H.dtype), V, alpha=alpha)


def held_out_alpha(
    W: Tensor,  # (N, K)
    V: Tensor,  # (N, K) a step made from other tokens
    H: Tensor,  # (K, K) of held-out tokens
    C: Tensor,  # (K, K) of held-out tokens
) -> float:
    """The α in [0, 1] with the least E‖W x_dense - (W + αV) x‖² on held-out tokens.

    The loss is const - 2α·tr(W (C - H) Vᵀ) + α²·tr(V H Vᵀ). For a stage, stack the rows of its linears.
    """
    with fast_products():
        along = ((W.to(H.dtype) @ (C - H)) * V).sum()
        curve = ((V @ H) * V).sum()
    alpha = float((along / curve).item()) if bool((curve > 0).item()) else 0.0
    return min(max(alpha, 0.0), 1.0)
