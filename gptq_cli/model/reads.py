"""Whether two modules read the same tensor.

An address and a shape do not identify a tensor: when it is freed, the allocator reuses its address for the
next one of that size. So a `Read` keeps its tensor alive, and two reads are equal when they are of one
tensor, or of equal views of one storage, that was not written to in between. On the meta device every address
is 0; the comparison works there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A tensor at the moment when it was read. Keeps it alive, and so at its address."""

    tensor: Tensor
    version: int
    """How often the tensor, or the one it is a view of, had been written to in place."""

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """`tensor` as it is now."""
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)

    def same(self, other: Read) -> bool:
        """True if both read the same elements in the same order with the same values."""
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
