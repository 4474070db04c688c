"""How fast and how exactly matrices are multiplied, set for one matmul at a time.

An fp32 matmul may run at bf16 speed on a CPU (oneDNN) or with TF32 on CUDA. PyTorch's switch for this is
process-wide, and another library may have set it either way. So each matmul in `gptq_cli.gptq` that depends
on it sets what it needs and restores the switch, also when it raises.

- `fast_matmul()`: inputs may be rounded to bf16 on a CPU (8 bits of mantissa) and to TF32 on CUDA (11 bits,
  as many as fp16 has); sums are fp32. Tensors that hold bf16 values lose nothing. A CPU without fast bf16
  does a plain fp32 matmul.
- `exact_matmul()`: fp32 inputs keep all their bits. A solve runs in this scope, except for its large matmuls.
- `exact_bf16_product()`: bf16 inputs as they are, products and sums in fp32, where a device has that: half
  the bytes of widened inputs, and twice the speed of TF32.

float64 is the same under both.

Whether a CPU multiplies 16-bit matrices fast is measured once, by `fast_matmul_supported`: an x86 without
AVX512_BF16 or AMX multiplies bf16 matrices at a tenth of its fp32 speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gptq_cli.timing import fastest

_PROBE_SIZE, _PROBE_TRIES = 384, 3
_TRIED_TOKENS, _TRIED_SIZE = 256, 32
_EXACT = 1e-6
"""Relative error of sums in fp32; one rounding to bf16 makes about 1e-3 of it."""
_MARGIN = 2.0
"""Where 16 bits are supported they take a half to a fifth of fp32's time, elsewhere ten times as long."""


@cache
def fast_matmul_supported(dtype: torch.dtype, device_type: str) -> bool:
    """True unless a matmul in `dtype` takes more than twice the time of an fp32 one.

    Only CPUs and 16-bit dtypes are measured: three small matmuls of each kind, 10 to 100 ms. The result is a
    fact about the machine, so it is kept for the process.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    return _seconds(dtype) <= _MARGIN * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of a few tries: other load can only make a try longer."""
    x = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
    torch.mm(x, x)
    return fastest(lambda: torch.mm(x, x), attempts=_PROBE_TRIES)


@contextmanager
def _precision(cpu: str, cuda: str) -> Iterator[None]:
    mkldnn: Any = torch.backends.mkldnn
    backends: tuple[Any, Any] = (mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, wanted in zip(backends, (cpu, cuda), strict=True):
            backend.fp32_precision = wanted
        yield
    finally:
        for backend, old in zip(backends, before, strict=True):
            backend.fp32_precision = old


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Inside this scope fp32 matmuls are fast: exact for bf16 values, fp32 sums."""
    with _precision("bf16" if fast_matmul_supported(torch.bfloat16, "cpu") else "ieee", "tf32"):
        yield


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Inside this scope fp32 matmuls use all bits of their inputs, whatever the process-wide setting."""
    with _precision("ieee", "ieee"):
        yield


AddProduct = Callable[[Tensor, Tensor, Tensor], object]
"""C (m, n) fp32, A (m, k) bf16, B (k, n) bf16: C += A B."""


def _add_in_place(C: Tensor, A: Tensor, B: Tensor) -> None:
    torch.addmm(C, A, B, out_dtype=torch.float32, out=C)


def _add_after(C: Tensor, A: Tensor, B: Tensor) -> None:
    C.add_(torch.mm(A, B, out_dtype=torch.float32))


@cache
def exact_bf16_product(device: torch.device) -> AddProduct | None:
    """How `device` adds a product of bf16 matrices to an fp32 one, without rounding it to bf16 in between;
    None where it does not, and for a CPU.

    Which of torch's versions has it on which device is not written down, so it is asked, once for the
    process: the first way that gives the float64 result of a small problem is it.
    """
    if device.type == "cpu":
        return None
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(_TRIED_TOKENS, 2 * _TRIED_SIZE, generator=generator).to(torch.bfloat16)
    want = 1 + X[:, :_TRIED_SIZE].double().T @ X.double()
    X = X.to(device)
    for way in (_add_in_place, _add_after):
        C = torch.ones(2 * _TRIED_SIZE, 4 * _TRIED_SIZE, device=device)
        # as in a Hessian: a part of a larger one
        part = C[:_TRIED_SIZE, : 2 * _TRIED_SIZE]
        try:
            way(part, X[:, :_TRIED_SIZE].T, X)
        except (RuntimeError, TypeError) as error:  # no such operator, no such argument
            if isinstance(error, torch.OutOfMemoryError):
                raise
            continue
        off = (part.cpu().double() - want).norm() / want.norm()
        if off < _EXACT and bool((C[_TRIED_SIZE:] == 1).all()) and bool((C[:, 2 * _TRIED_SIZE :] == 1).all()):
            return way
    return None


def product_into(C: Tensor, dtype: torch.dtype) -> tuple[AddProduct, torch.dtype]:
    """How a product of numbers of `dtype` is added to C, and the dtype that its factors are to have."""
    exact = exact_bf16_product(C.device) if (dtype, C.dtype) == (torch.bfloat16, torch.float32) else None
    return (Tensor.addmm_, C.dtype) if exact is None else (exact, dtype)
