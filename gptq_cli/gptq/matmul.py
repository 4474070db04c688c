"""How fast and how exactly matrices are multiplied, said for one product at a time.

An fp32 product may run at bf16 speed on a CPU (oneDNN) or on TF32 units (CUDA). The switch is process-wide
in PyTorch, and another library may have turned it either way; so each product in `gptq_cli.gptq` that cares
says what it needs and puts the switch back, also when it raises.

- `fast_matmul()`: inputs may be cut to bf16 on a CPU (8 bits of mantissa) and to TF32 on CUDA (11 bits,
  as many as fp16 has); sums are fp32. Tensors that hold bf16 values lose nothing. Where a CPU has no such
  units the result is a plain fp32 product.
- `exact_matmul()`: fp32 inputs keep all their bits. A solve runs in this scope, but for its long products.

float64 products are the same under both.

Whether a CPU multiplies 16-bit matrices fast is measured once, by `fast_matmul_supported`. It is worth
knowing: an x86 without AVX512_BF16 or AMX multiplies bf16 matrices at a tenth of its fp32 speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from gptq_cli.timing import fastest

_PROBE_SIZE, _PROBE_TRIES = 384, 3
_MARGIN = 2.0
"""With units 16 bits take a half to a fifth of fp32's time, without them ten times it: no doubt is left."""


@cache
def fast_matmul_supported(dtype: torch.dtype, device_type: str) -> bool:
    """True unless products of matrices of `dtype` take more than twice the time of fp32 ones.

    Only CPUs are asked, and only about 16-bit numbers: three small products of each kind, 10 to 100 ms. The
    answer is a fact about the machine, so it is kept for the process.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    return _seconds(dtype) <= _MARGIN * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of some tries: whatever else the machine does only makes one longer."""
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
    """fp32 products on the fast units inside this scope: exact for bf16 values, fp32 sums."""
    with _precision("bf16" if fast_matmul_supported(torch.bfloat16, "cpu") else "ieee", "tf32"):
        yield


@contextmanager
def exact_matmul() -> Iterator[None]:
    """fp32 products with all bits of their inputs inside this scope, whatever the process asked for."""
    with _precision("ieee", "ieee"):
        yield
