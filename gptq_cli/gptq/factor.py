"""From H to R: one damped Cholesky factor, in the order in which columns are solved.

The original code factorises three times: H = L Lᵀ, then H⁻¹ from L, then U with UᵀU = H⁻¹. One is enough.
Let H + λI = R Rᵀ with R upper triangular (an ordinary Cholesky of H with its rows and columns reversed).
Then U = R⁻¹, and every diagonal block of U is the inverse of that block of R alone: U_bb = R_bb⁻¹. With
D = W - Q over the columns i < a that are done, the weights that GPTQ sees in columns a..b, all feedback
included, are

    B = W_ab + (D R[:a, a:b]) U_bb

which `columns_with_feedback` computes. It equals W_ab - E U[:a, a:b] of the paper, because D = E U on
finished columns and U[:a, a:b] = -U[:a, :a] R[:a, a:b] U_bb. This takes a third of the factorisation work and
no inverse, and columns that are not due yet are never rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.gptq.matmul import fast_matmul

_MAX_DAMPING = 1.0
_GATHER_ROWS = 256
"""Rows of H that are reordered at a time: the temporary copy has this many."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factor:
    """R with H[order][:, order] + λI = R Rᵀ, and how it was obtained."""

    RT: Tensor | None
    """(K, K) lower triangular: Rᵀ. None: H is all zero, or no allowed damping made it positive definite."""
    damping: Tensor
    """λ, a scalar tensor on H's device."""
    damp_percent: float
    """λ over the mean of the live diagonal; the last one tried when none worked."""
    attempts: int
    """Factorisations tried; 0 when H is all zero."""


def dead_columns(H: Tensor) -> Tensor:  # (K,) bool
    """Columns whose input was never anything but 0: H_kk = 0. Their weights are set to 0 and cost nothing."""
    return H.diagonal() == 0


def damping_steps(damp_percent: float) -> tuple[float, ...]:
    """The dampings tried in turn: doubled until the full mean of the diagonal is added."""
    steps = [damp_percent]
    while steps[-1] < _MAX_DAMPING:
        steps.append(min(2 * steps[-1], _MAX_DAMPING))
    return tuple(steps)


def factorize(
    H: Tensor,  # (K, K) undamped; not changed
    order: Tensor,  # (K,) int64: the original column that is solved i-th
    damp_percent: float,
) -> Factor:
    """Factorise H with the smallest damping of `damping_steps` that works.

    λ = damp_percent · mean of the live diagonal. A dead column has no connection to the others and gets the
    mean as its diagonal entry. Cost per attempt: K³/3 multiply-adds and one scalar read from the device; one
    K by K buffer in all.
    """
    K = H.shape[0]
    diagonal = H.diagonal()
    dead = dead_columns(H)
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    if bool(dead.all().item()):
        return Factor(RT=None, damping=mean, damp_percent=damp_percent, attempts=0)
    reverse = order.flip(0)
    fill = torch.where(dead, mean, torch.zeros_like(mean))[reverse]
    A = torch.empty_like(H)
    info = torch.empty((), dtype=torch.int32, device=H.device)
    steps = damping_steps(damp_percent)
    for attempt, damp in enumerate(steps, start=1):
        for part in range(0, K, _GATHER_ROWS):
            rows = slice(part, part + _GATHER_ROWS)
            torch.index_select(H[reverse[rows]], 1, reverse, out=A[rows])
        damping = damp * mean
        A.diagonal().add_(fill).add_(damping)
        L = A.T  # column-major, as LAPACK and cuSOLVER want it, so that the factor replaces A in place
        torch.linalg.cholesky_ex(L, out=(L, info))
        if int(info.item()) == 0:
            reverse_in_place(A)
            return Factor(RT=A, damping=damping, damp_percent=damp, attempts=attempt)
    return Factor(RT=None, damping=damping, damp_percent=steps[-1], attempts=len(steps))


def reverse_in_place(A: Tensor) -> None:
    """Reverse the rows and the columns of a contiguous matrix without a second one."""
    flat = A.view(-1)
    half = flat.numel() // 2
    step = 1 << 20
    for a in range(0, half, step):
        b = min(a + step, half)
        front = flat[a:b].flip(0)
        flat[a:b] = flat[flat.numel() - b : flat.numel() - a].flip(0)
        flat[flat.numel() - b : flat.numel() - a] = front


def columns_with_feedback(
    W: Tensor,  # (K, N): rows < a hold D = W - Q of finished columns, the others W
    RT: Tensor,  # (K, K)
    a: int,
    b: int,
) -> tuple[Tensor, Tensor]:  # B (b-a, N), U_bbᵀ (b-a, b-a)
    """Columns a..b with the feedback of all columns before a, and the block of U that belongs to them.

    The large matmul is a fast one: a correction rounded to bf16 is off by 2⁻⁹ of itself, about a thousandth
    of a quantization step, which does not change the loss (tests/gptq/test_solver.py tests the bound).
    """
    eye = torch.eye(b - a, dtype=RT.dtype, device=RT.device)
    UT = torch.linalg.solve_triangular(RT[a:b, a:b], eye, upper=False)
    if a == 0:
        return W[a:b].clone(), UT
    with fast_matmul():
        feedback = RT[a:b, :a] @ W[:a]
    return torch.addmm(W[a:b], UT, feedback), UT
