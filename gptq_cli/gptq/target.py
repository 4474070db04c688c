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
the same formula holds, and the linear makes up for what earlier blocks did to the stream, as far as x
foretells it.

D and B may come from some of the tokens that H is made of: they are small, and held-out tokens say how far
they can be trusted. α = 1 trusts the calibration tokens fully; with few tokens a column the step overfits,
and α < 1 pays. How much less need not be guessed: on tokens that were not used for the step the loss is a
parabola in α, and `held_out_alpha` returns its lowest point.

Sources: Qronos (arXiv 2505.11695), GPTAQ (2504.02692), which apply the same correction column by column, and
LoaQ (2509.06297), which also counts the residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.gptq.factor import factorize
from gptq_cli.gptq.precision import fast_products


def asymmetric_step(
    B: Tensor,  # (N, K) = W D, or with the residual's error; see above
    H: Tensor,  # (K, K) mean of x xᵀ, undamped
    damp_percent: float,
) -> Tensor | None:  # V (N, K) = B (H + λI)⁻¹, in H's dtype; None when no damping factorises H
    """The full step from W to the asymmetric target. Cost: one Cholesky and N·K² multiply-adds."""
    RT = factorize(H, torch.arange(H.shape[0], device=H.device), damp_percent).RT
    if RT is None:
        return None
    # (H + λI)⁻¹ = R⁻ᵀ R⁻¹ and RT = Rᵀ is lower: two triangular solves from the right
    half = torch.linalg.solve_triangular(RT, B.to(H.dtype), upper=False, left=False)
    V: Tensor = torch.linalg.solve_triangular(RT.T, half, upper=True, left=False)
    return V


def held_out_alpha(
    B: Tensor,  # (N, K) of held-out tokens
    V: Tensor,  # (N, K) a step made from other tokens
    H: Tensor,  # (K, K) of held-out tokens
) -> float:
    """The α in [0, 1] with the least E‖W x_dense - (W + αV) x‖² on held-out tokens.

    The loss is const - 2α·tr(B Vᵀ) + α²·tr(V H Vᵀ). For a stage, stack the rows of its linears.
    """
    with fast_products():
        along = (B * V).sum()
        curve = ((V @ H) * V).sum()
    alpha = float((along / curve).item()) if bool((curve > 0).item()) else 0.0
    return min(max(alpha, 0.0), 1.0)
