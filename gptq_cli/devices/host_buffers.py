"""Main memory that bytes pass through on their way to a device and back.

A device's own engine copies from main memory only where that is *pinned*, so that the system may not move or
swap it. From other memory the driver first copies into pinned memory of its own, which halves the rate or
worse. Pinning takes as long as copying, so buffers are made once and used again.

The engine works through its copies in order with everything else that is started on the device, while the
host goes on: what is computed with a copy is started after it and finds it there. Only who writes into a
buffer again has to wait until it was copied from, and that is the thread that reads ahead.

torch rounds pinned memory up to a power of two, so buffers come in pieces of `PIECE_BYTES`: what is larger
lies in several pieces, and what is smaller shares one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

PIECE_BYTES = 64 << 20
_ALIGNED = 64
"""Where something begins in a piece: a multiple of what any dtype and any processor asks for."""


def pins_memory() -> bool:
    """Whether this machine has an accelerator for whose copies main memory can be pinned."""
    current = torch.accelerator.current_accelerator()
    return current is not None and current.type in ("cuda", "xpu", "npu") and torch.accelerator.is_available()


class HostBuffers:
    """Pieces of main memory that are used again and again, pinned where that is possible.

    What was taken before `rewind` is overwritten after it, once the copies from it are made.
    """

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._piece, self._used = 0, 0
        self._pinned = pins_memory()
        self._copied: torch.Event | None = None

    def copying(self, device: torch.device) -> None:
        """Copies to `device` were started that may still be on their way. Call it where `device` is the
        current one."""
        if self._pinned:
            self._copied = torch.Event(device)
            self._copied.record(torch.accelerator.current_stream(device))

    def _wait(self) -> None:
        """Until the copies are made that were started before `copying`."""
        copied, self._copied = self._copied, None
        if copied is not None:
            copied.synchronize()

    def rewind(self) -> None:
        """Begin again at the first piece."""
        self._piece, self._used = 0, 0

    def reserve(self, sizes_bytes: Iterable[int]) -> None:
        """Have room for so much before it is taken: a thread that only takes asks nothing of a device."""
        total = sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes_bytes)
        while len(self._pieces) * PIECE_BYTES < total:
            self._pieces.append(self._made())

    def take(self, size_bytes: int) -> list[Tensor]:  # uint8, of `size_bytes` in all
        """The next `size_bytes`, in as many pieces as it takes, at least one. Waits for copies from them."""
        self._wait()
        taken: list[Tensor] = [] if size_bytes else [torch.empty(0, dtype=torch.uint8)]
        while size_bytes:
            piece = self._next()
            part = piece[self._used : self._used + size_bytes]
            size_bytes -= len(part)
            self._used = -(-(self._used + len(part)) // _ALIGNED) * _ALIGNED
            taken.append(part)
        return taken

    def _next(self) -> Tensor:
        """The piece in which there is room."""
        if self._used >= PIECE_BYTES:
            self._piece, self._used = self._piece + 1, 0
        if self._piece == len(self._pieces):
            self._pieces.append(self._made())
        return self._pieces[self._piece]

    def _made(self) -> Tensor:
        return torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._pinned)

    def free(self) -> None:
        """Give the memory back to the system."""
        self._wait()
        self._pieces.clear()
        self.rewind()
        empty = getattr(torch.accelerator, "empty_host_cache", None)  # torch 2.12 has it
        if self._pinned and empty is not None:
            empty()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; what goes from an accelerator to main memory comes to lie in pinned memory, from
    where it goes back at the full rate."""
    if tensor.device == device:
        return tensor
    if device.type == "cpu" and pins_memory():
        resting = torch.empty_like(tensor, device=device, pin_memory=True)
        return resting.copy_(tensor)
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and tensor.is_pinned())
