"""From activations to H, the second moment of a linear's input.

A linear computes y = W x. Quantizing it to Q costs E‖W x - Q x‖² = tr((W-Q) H (W-Q)ᵀ) with H = E[x xᵀ], so
H is all that GPTQ needs to know about the calibration data. The original code scales H by 2 (the loss's
second derivative); a common factor changes neither codes nor scales nor relative losses, and is left out.

Sums are kept, not running means, and divided once: beyond fp32 rounding, the result does not depend on how
the tokens were split into batches. H is symmetric, so only the lower block triangle is summed, and mirrored
once, in `matrix()`. The product of two bf16 numbers is exact in fp32, so bf16 activations use the fast matmul
(see matmul.py) and lose nothing, on CUDA without being widened first; so do fp16 activations with TF32;
everything else is multiplied in plain fp32.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gptq_cli.gptq.matmul import exact_matmul, fast_matmul, fast_matmul_supported, product_into
from gptq_cli.gptq.moment import Moment
from gptq_cli.gptq.triangle import block_rows

_CHUNK_VALUES = 1 << 24
"""Activations are widened to fp32 in chunks of about this many values (64 MiB)."""
_CACHED_ROWS, _CACHED_VALUES = 512, 1 << 20
"""Smaller chunks on a CPU, so that they stay in the cache, but with enough rows that moving H stays cheap."""


def _chunk_rows(width: int, device: torch.device, *, widened: bool) -> int:
    if device.type != "cpu" and not widened:
        return sys.maxsize
    rows = max(1, _CHUNK_VALUES // width)
    return min(rows, max(_CACHED_ROWS, _CACHED_VALUES // width)) if device.type == "cpu" else rows


def _matmul_scope(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """The fastest scope in which numbers of `dtype` are multiplied without loss on `device`."""
    lossless = dtype == torch.bfloat16 or (dtype == torch.float16 and device.type == "cuda")
    return fast_matmul() if lossless else exact_matmul()


class Hessian(Moment):
    """H = sum of x xᵀ over calibration tokens / tokens. The only mutable object of the maths.

    >>> with Hessian(64) as hessian:
    ...     hessian.add(x)
    ...     H = hessian.matrix()
    """

    def add(
        self,
        x: Tensor,  # (..., K) inputs of the linear, any floating dtype; every row is a token
        *,
        counted: bool = True,  # False: tokens that were added before, and weigh more
    ) -> None:
        """Add tokens. Cost: tokens·K² multiply-adds, the lower half of K by K in block rows."""
        H, K = self._growing(), self.in_features
        rows = self._rows(x)
        add_product_, dtype = product_into(H, x.dtype)
        for part in torch.split(rows, _chunk_rows(K, H.device, widened=dtype != x.dtype)):
            X = part.to(device=H.device, dtype=dtype)
            with _matmul_scope(x.dtype, H.device):
                for a, b in block_rows(K):
                    add_product_(H[a:b, :b], X[:, a:b].T, X[:, :b])
        self.tokens += rows.shape[0] if counted else 0

    def _stored(self, total: Tensor) -> list[Tensor]:
        return [total[a:b, :b] for a, b in block_rows(self.in_features)]

    def finite(self) -> Tensor:
        """A bool on the device, False when NaN or infinity came in. Looks at the diagonal alone: every value
        lands there squared."""
        return torch.isfinite(self._open.diagonal().sum())

    def matrix(self) -> Tensor:  # (K, K), fp32 unless made otherwise
        """The mean, exactly symmetric; zeros when no token was added (the solver then rounds to nearest).

        It is this object's own memory: afterwards `add` raises.
        """
        H = self._mean()
        if not self._finished:
            for a, b in block_rows(self.in_features):
                H[:a, a:b] = H[a:b, :a].T
                corner = H[a:b, a:b].tril()
                H[a:b, a:b] = corner + corner.tril(-1).T
            self._finished = True
        return H


class CrossMoment(Moment):
    """Sum of e xᵀ / tokens: the cross moment of an error e and the quantized model's input x.

    With e = x_dense - x it is the D of goal.py, with errors of the output it is the B. On a CPU with fast
    bf16 the sum of each chunk is rounded to bf16: a relative error of 2⁻⁹, small beside the sampling error of
    1/√tokens. `rows`: features of e; None: as many as x has.
    """

    def add(
        self,
        error: Tensor,  # (..., N)
        x: Tensor,  # (..., K) of the same tokens
        *,
        counted: bool = True,  # as in `Hessian.add`
    ) -> None:
        """Add tokens; both must hold the same ones in the same order. Cost: tokens·N·K multiply-adds."""
        C = self._growing()
        E, X = error.reshape(-1, C.shape[0]), self._rows(x)
        if E.shape[0] != X.shape[0]:
            raise ValueError(f"the error has {E.shape[0]} tokens, the input {X.shape[0]}")
        wider = torch.promote_types(error.dtype, x.dtype)
        add_product_, dtype = product_into(C, wider)
        chunk = _chunk_rows(max(C.shape), C.device, widened=dtype != wider)
        for e, q in zip(torch.split(E, chunk), torch.split(X, chunk), strict=True):
            if wider == torch.bfloat16 and C.device.type == "cpu" and fast_matmul_supported(wider, "cpu"):
                C += e.T @ q  # twice the speed of widening both
                continue
            with _matmul_scope(wider, C.device):
                add_product_(C, e.to(C.device, dtype).T, q.to(C.device, dtype))
        self.tokens += X.shape[0] if counted else 0

    def finite(self) -> Tensor:
        """A bool on the device, False when NaN or infinity came in with an error. Looks at one column: each
        error lands there once."""
        return torch.isfinite(self._open[:, 0].sum())

    def matrix(self) -> Tensor:  # (N, K)
        """The mean. It is this object's own memory: afterwards `add` raises."""
        C = self._mean()
        self._finished = True
        return C


def shrink(
    H: Tensor,  # (K, K) mean over few tokens
    tokens: int,
    pooled: Tensor,  # (K, K) mean over many tokens of a wider population (all experts of a block, say)
) -> Tensor:
    """(n·H + m·pooled) / (n + m): the Hessian of a linear with too few tokens of its own.

    n tokens span at most n of K directions. Counting the pool as m = K tokens leaves no direction empty, and
    the linear's own data outweigh it once there are more than K tokens.
    """
    return torch.lerp(pooled, H, tokens / (tokens + H.shape[0]))
