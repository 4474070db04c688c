"""How fast and how exactly matrices are multiplied, set for one matmul at a time.

An fp32 matmul may run at bf16 speed on a CPU (oneDNN) or with TF32 on CUDA. PyTorch's switch for this is
process-wide, and another library may have set it either way. So each matmul in `gptq_cli.gptq` that depends
on it sets what it needs and restores the switch, also when it raises.

- `fast_matmul()`: inputs may be rounded to bf16 on a CPU (8 bits of mantissa) and to TF32 on CUDA (11 bits,
  as many as fp16 has); sums are fp32. Tensors that hold bf16 values lose nothing. A CPU without fast bf16
  does a plain fp32 matmul.
- `exact_matmul()`: fp32 inputs keep all their bits. A solve runs in this scope, except for its large matmuls.

float64 is the same under both.

Whether a CPU multiplies 16-bit matrices fast is measured once, by `fast_matmul_supported`: an x86 without
AVX512_BF16 or AMX multiplies bf16 matrices at a tenth of its fp32 speed.
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
