"""Working memory of the dequantize path.

A piece of a dense weight is megabytes, made and dropped hundreds of times a forward. glibc hands such blocks
back to the system and takes them again, and every page of them faults anew: that alone doubled the time of a
prompt. On the CPU the pieces are therefore made in buffers that stay, one set a thread, shared by all linears
of a model. Accelerators have caching allocators and need none of this.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Fresh:
    """New memory for every request: on accelerators, under autograd, under torch.compile."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any content."""
        return torch.empty(shape, dtype=dtype, device=device)


class Scratch(Fresh):
    """The same memory for every request of a name and dtype: what was taken before is overwritten."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        """Copies and pickles of a model get a scratch of their own."""
        return Scratch, ()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view of this thread's buffer `name`, which grows where it has to."""
        key = f"{name} {dtype} {device}"
        size = math.prod(shape)
        buffer: Tensor | None = self._local.__dict__.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside
                buffer = torch.empty(size, dtype=dtype, device=device)
            self._local.__dict__[key] = buffer
        return buffer[:size].view(shape)


def usable(rows: Tensor) -> bool:
    """Whether results for the input `rows` may be made in memory that is used again."""
    recorded = torch.is_grad_enabled() and rows.requires_grad
    return rows.device.type == "cpu" and not recorded and not torch.compiler.is_compiling()
