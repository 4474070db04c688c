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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_cli.gptq.batch import add_product_, diagonal_of
from gptq_cli.gptq.matmul import fast_matmul

_MAX_DAMPING = 1.0
_NOTHING = -1
"""In the place of what a factorisation says: H is all zero."""
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


def dead_columns(H: Tensor) -> Tensor:  # (…, K) bool
    """Columns whose input was never anything but 0: H_kk = 0. Their weights are set to 0 and cost nothing."""
    return diagonal_of(H) == 0


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
    """Factorise H with the smallest damping of `damping_steps` that works, see `factorize_each`."""
    return factorize_each(H.unsqueeze(0), order, damp_percent)[1][0]


def factorize_each(
    H: Tensor,  # (E, K, K) undamped; not changed
    order: Tensor,  # (E, K) int64: the original column that is solved i-th; or (K,) for all
    damp_percent: float,
) -> tuple[Tensor, list[Factor]]:  # (E, K, K): the Rᵀ of all factors, which are views of it
    """Factorise every H with the smallest damping of `damping_steps` that works for it.

    λ = damp_percent · mean of the live diagonal. A dead column has no connection to the others and gets the
    mean as its diagonal entry. Those that fail are tried again, the others are not touched: each has attempts
    of its own. Cost per attempt: K³/3 multiply-adds, and one read from the device for all; one K by K buffer
    per H in all, and a second one while some of several are tried again.
    """
    K = H.shape[-1]
    dead = dead_columns(H)
    mean = diagonal_of(H).sum(-1) / (~dead).sum(-1).clamp(min=1)
    factors = [Factor(RT=None, damping=m, damp_percent=damp_percent, attempts=0) for m in mean]
    reverse = order.expand(H.shape[0], K).flip(-1)
    fill = torch.where(dead, mean.unsqueeze(-1), torch.zeros_like(mean).unsqueeze(-1)).gather(-1, reverse)
    A = torch.empty_like(H)
    waiting = list(range(H.shape[0]))
    for attempt, damp in enumerate(damping_steps(damp_percent), start=1):
        if not waiting:
            break
        damping = damp * mean
        tried = A if len(waiting) == H.shape[0] else A[waiting]
        for e, damped in zip(waiting, tried, strict=True):
            for part in range(0, K, _GATHER_ROWS):
                rows = slice(part, part + _GATHER_ROWS)
                torch.index_select(H[e, reverse[e, rows]], 1, reverse[e], out=damped[rows])
            damped.diagonal().add_(fill[e]).add_(damping[e])
        L = tried.mT  # column-major, as LAPACK and cuSOLVER want it, so that the factor replaces A in place
        info = torch.empty(len(waiting), dtype=torch.int32, device=H.device)
        torch.linalg.cholesky_ex(L, out=(L, info))
        problems = info if attempt > 1 else torch.where(dead.all(-1), _NOTHING, info)
        failed = []
        for e, found, problem in zip(waiting, tried, problems.tolist(), strict=True):
            if problem == _NOTHING:
                continue
            factors[e] = Factor(RT=None, damping=damping[e], damp_percent=damp, attempts=attempt)
            if problem:
                failed.append(e)
                continue
            if tried is not A:
                A[e] = found
            reverse_in_place(A[e])
            factors[e] = replace(factors[e], RT=A[e])
        waiting = failed
    return A, factors


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
    W: Tensor,  # (…, K, N): rows < a hold D = W - Q of finished columns, the others W
    RT: Tensor,  # (…, K, K)
    a: int,
    b: int,
) -> tuple[Tensor, Tensor]:  # B (…, b-a, N), U_bbᵀ (…, b-a, b-a)
    """Columns a..b with the feedback of all columns before a, and the block of U that belongs to them.

    The large matmul is a fast one: a correction rounded to bf16 is off by 2⁻⁹ of itself, about a thousandth
    of a quantization step, which does not change the loss (tests/gptq/test_solver.py tests the bound).
    """
    eye = torch.eye(b - a, dtype=RT.dtype, device=RT.device)
    UT = torch.linalg.solve_triangular(RT[..., a:b, a:b], eye, upper=False)
    if a == 0:
        return W[..., a:b, :].clone(memory_format=torch.contiguous_format), UT
    with fast_matmul():
        feedback = RT[..., a:b, :a] @ W[..., :a, :]
    B = W[..., a:b, :].clone(memory_format=torch.contiguous_format)
    return add_product_(B, UT, feedback), UT
