"""A sum over the tokens of calibration, and how its parts are put together.

What is summed is said by those who derive from it (hessian.py). Where several processes have a part of the
tokens each, a sum is taken out in pieces, and put back as the sum of all pieces (`take`, `put`).
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class Moment:
    """A sum over tokens of outer products, and the number of tokens; frees its memory on leaving `with`."""

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        rows: int | None = None,
    ) -> None:
        self.in_features = in_features
        self.tokens = 0
        self._taken = 0
        self.device = torch.device(device)
        shape = (in_features if rows is None else rows, in_features)
        self._sum: Tensor | None = torch.zeros(shape, dtype=dtype, device=device)
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def free(self) -> None:
        """Give the memory back; the tensor that `matrix()` returned stays valid."""
        self._sum = None

    @property
    def _open(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("this moment was freed: it lives inside its `with` block")
        return self._sum

    def _growing(self) -> Tensor:
        if self._finished:
            raise RuntimeError("matrix() was called: no tokens can be added to a finished moment")
        return self._open

    def _rows(self, x: Tensor) -> Tensor:
        """`x` (..., K) as (tokens, K)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"activations have {x.shape[-1]} features, this moment has {self.in_features}")
        return x.reshape(-1, self.in_features)

    def take(self) -> Tensor | None:
        """What was summed since the last `take`, as one flat tensor, or None where no token came since then;
        the sum starts again at zero. `tokens` counts on. For sums that are made in parts: see `put`."""
        if self.tokens == self._taken:
            return None
        self._taken = self.tokens
        flat = torch.cat([part.flatten() for part in self._stored(self._growing())])
        self._open.zero_()
        return flat

    def put(self, flat: Tensor, tokens: int) -> None:
        """Have the sum of several `take`s, of `tokens` in all, as this moment's sum."""
        start = 0
        for part in self._stored(self._growing()):
            part.copy_(flat[start : start + part.numel()].view(part.shape))
            start += part.numel()
        self.tokens = tokens

    @property
    def here(self) -> bool:
        """It was not freed."""
        return self._sum is not None

    def elsewhere(self, tokens: int) -> None:
        """Another process has the sum, of so many tokens in all."""
        self.tokens = tokens
        self.free()

    @property
    def stored_values(self) -> int:
        """Numbers in what `take` returns."""
        return sum(part.numel() for part in self._stored(self._open))

    def _stored(self, total: Tensor) -> list[Tensor]:
        """The parts of the sum that are summed."""
        return [total]

    def _mean(self) -> Tensor:
        total = self._open
        if not self._finished and self.tokens:
            total.div_(self.tokens)
        return total
