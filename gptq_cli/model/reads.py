"""What a module read, told apart from everything else that was ever in memory.

An address and a shape do not name a tensor: as soon as it is gone, the allocator gives the address to the
next one of its size. So a `Read` holds the tensor, and two reads are the same when they are one tensor, or
views of one storage in the same order, that nobody wrote to in between. On the meta device every address
is 0, and the same comparison holds there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A tensor at the moment when it was read; alive, and so at its address, for as long as this is."""

    tensor: Tensor
    version: int
    """How often it, or what it is a view of, had been written to in place."""

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """`tensor` as it is now."""
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)

    def same(self, other: Read) -> bool:
        """True when both saw the same elements in the same order with the same values."""
        a, b = self.tensor, other.tensor
        return self.version == other.version and (
            a is b
            or (
                a.untyped_storage()._cdata == b.untyped_storage()._cdata
                and a.storage_offset() == b.storage_offset()
                and a.shape == b.shape
                and a.stride() == b.stride()
                and a.dtype == b.dtype
            )
        )
