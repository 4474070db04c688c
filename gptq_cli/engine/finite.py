"""Noticing NaN and infinity, and naming where they came from.

Checking every activation as it passes would synchronise with the device each time. Instead each
micro-batch leaves one sum a sample on the device, and the sums are read once a stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.errors import NonFinite


class FiniteWatch:
    """Remembers, for one stage, which samples were finite."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        """Note a micro-batch x (batch, …)."""
        self._sums.append(x.sum(dim=tuple(range(1, x.dim())), dtype=torch.float32))

    def check(self, block: str, linear: str) -> None:
        """Raise `NonFinite` naming the block, the linear and the first sample that was not finite."""
        if not self._sums:
            return
        finite = torch.isfinite(torch.cat([sums.flatten() for sums in self._sums]))
        if bool(finite.all()):
            return
        sample = int((~finite).nonzero()[0])
        raise NonFinite(
            f"the input of {linear!r} in block {block!r} is not finite for calibration sample {sample}",
            hint="run with --dtype float32 or bfloat16, or leave that sample out",
        )
