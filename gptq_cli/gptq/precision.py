"""How fast and how exactly fp32 matrices are multiplied, said for one product at a time.

An fp32 product may run at bf16 speed on a CPU (oneDNN) or on TF32 units (CUDA). The switch is process-wide
in PyTorch, and another library may have turned it either way; so each product in `gptq_cli.gptq` that cares
says what it needs and puts the switch back, also when it raises.

- `fast_products()`: inputs may be cut to bf16 on a CPU (8 bits of mantissa) and to TF32 on CUDA (11 bits,
  as many as fp16 has); sums are fp32. Tensors that hold bf16 values lose nothing. Where a CPU has no such
  units the result is a plain fp32 product.
- `exact_products()`: fp32 inputs keep all their bits.

float64 products are the same under both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
def fast_products() -> Iterator[None]:
    """fp32 products on the fast units inside this scope: exact for bf16 values, fp32 sums."""
    with _precision("bf16", "tf32"):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products with all bits of their inputs inside this scope, whatever the process asked for."""
    with _precision("ieee", "ieee"):
        yield
