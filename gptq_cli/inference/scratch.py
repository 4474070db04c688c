"""Working memory of the dequantize path.

A piece of a dense weight takes megabytes and is made and dropped hundreds of times per forward. glibc returns
such blocks to the system each time, and every page of a new one must be faulted in again, which alone doubled
the time of a prompt. On the CPU the pieces are therefore made in buffers that stay allocated: one set per
thread, shared by all linears of a model. Accelerators have caching allocators and need none of this.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Fresh:
    """New memory for every request: on accelerators, under autograd, under torch.compile."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with arbitrary content."""
        return torch.empty(shape, dtype=dtype, device=device)


class Scratch(Fresh):
    """The same memory for every request with one name and dtype: a new request overwrites the last."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        """Copies and pickles of a model get a scratch of their own."""
        return Scratch, ()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view of this thread's buffer `name`, which grows when needed."""
        key = f"{name} {dtype} {device}"
        size = math.prod(shape)
        buffer: Tensor | None = self._local.__dict__.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside
                buffer = torch.empty(size, dtype=dtype, device=device)
            self._local.__dict__[key] = buffer
        return buffer[:size].view(shape)


def usable(rows: Tensor) -> bool:
    """Whether results for the input `rows` may be made in memory that is reused."""
    recorded = torch.is_grad_enabled() and rows.requires_grad
    return rows.device.type == "cpu" and not recorded and not torch.compiler.is_compiling()
