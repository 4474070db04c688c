"""A batch of stages: the leading dimension, for operations that torch has for matrices alone.

Experts are many and small, and a loop over columns takes about as long for 100 rows as for 1,000. So stages
of one shape are solved side by side: their tensors get a leading dimension, one entry per stage, written `…`
in the shapes of this package. No entry sees another. A single stage has no leading dimension, and its matmuls
are those of matrices. On a CPU both give the same bits; where a device sums in another order in its batched
kernels, a code may change at a rounding tie.
"""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_of(A: Tensor) -> Tensor:  # (…, K), a view
    """The diagonal of every matrix."""
    return A.diagonal(dim1=-2, dim2=-1)


def add_product_(
    C: Tensor,  # (…, m, n); changed in place
    A: Tensor,  # (…, m, k)
    B: Tensor,  # (…, k, n)
    alpha: float = 1.0,
) -> Tensor:
    """C += α · A B."""
    return C.addmm_(A, B, alpha=alpha) if C.ndim == 2 else C.baddbmm_(A, B, alpha=alpha)


def subtract_outer_(
    C: Tensor,  # (…, m, n); changed in place
    a: Tensor,  # (…, m)
    b: Tensor,  # (…, n)
) -> Tensor:
    """C -= a bᵀ."""
    if C.ndim == 2:
        return C.addr_(a, b, alpha=-1)
    return C.addcmul_(a.unsqueeze(-1), b.unsqueeze(-2), value=-1)


def add_weighted_rows_(
    c: Tensor,  # (…, n); changed in place
    A: Tensor,  # (…, m, n)
    weight: Tensor,  # (…, m)
) -> Tensor:
    """c += Aᵀ weight."""
    if c.ndim == 1:
        return c.addmv_(A.T, weight)
    return c.add_(torch.bmm(weight.unsqueeze(1), A)[:, 0])


def rows_of(
    X: Tensor,  # (…, K, N)
    index: Tensor,  # (…, n) int64, or (n,) for all entries
) -> Tensor:  # (…, n, N), a copy
    """The rows `index` of every matrix."""
    return X.index_select(-2, index) if index.ndim == 1 else X[_entries(X), index]


def set_rows_(
    X: Tensor,  # (…, K, N); changed in place
    index: Tensor,  # (…, n) int64, or (n,) for all entries; no row twice
    rows: Tensor,  # (…, n, N)
) -> None:
    """X[index] = rows, in every matrix."""
    if index.ndim == 1:
        X.index_copy_(-2, index, rows)
    else:
        X[_entries(X), index] = rows


def add_rows_(
    X: Tensor,  # (…, K, N); changed in place
    index: Tensor,  # (…, n) int64, or (n,) for all entries; no row twice
    rows: Tensor,  # (…, n, N)
) -> None:
    """X[index] += rows, in every matrix."""
    if index.ndim == 1:
        X.index_add_(-2, index, rows)
    else:
        X[_entries(X), index] += rows


def columns_of(
    X: Tensor,  # (…, n, K)
    index: Tensor,  # (…, m) int64, or (m,) for all entries
) -> Tensor:  # (…, n, m), a copy
    """The columns `index` of every matrix."""
    if index.ndim == 1:
        return X.index_select(-1, index)
    return torch.take_along_dim(X, index.unsqueeze(-2), dim=-1)


def _entries(X: Tensor) -> Tensor:  # (E, 1)
    return torch.arange(X.shape[0], device=X.device).unsqueeze(1)
