"""The samples on their way through a block, and the paired ones through its dense copy beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.devices.host_memory import trim_heap
from gptq_cli.engine.forwards import Forwards
from gptq_cli.engine.stages import Stage

TRIM_EVERY = 4
"""Micro-batches after which freed heap pages are given back: 10 % off the peak, for milliseconds."""


@dataclass(frozen=True, slots=True)
class Streams:
    """The quantized block, and where samples are paired its dense copy."""

    quantized: Forwards
    dense: Forwards | None

    def inputs_of(
        self,
        stage: Stage,
        x: Tensor,
        dense_inputs: Iterator[tuple[Stage, Tensor]] | None,
        samples: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The input of a stage for one micro-batch, (samples, tokens, K), or (tokens, K) where tokens are
        routed; the same of the dense stream; and what its residual has more than that of the quantized one.
        """
        x_dense = next(dense_inputs)[1] if dense_inputs is not None else None
        residual = self.quantized.residual(stage)
        beside = self.dense if dense_inputs is not None else None
        dense_residual = beside.residual(stage) if beside is not None else None
        gap = None if residual is None or dense_residual is None else dense_residual - residual
        if not stage.once:
            return x, x_dense, gap
        # some blocks flatten (batch, seq_len) before a linear; the moments tell samples apart
        at = stage.batch_dim
        return samples_first(x, samples, at), _optional(x_dense, samples, at), _optional(gap, samples, at)


def samples_first(x: Tensor, samples: int, at: int) -> Tensor:  # (samples, tokens, features)
    """The samples are dimension `at`."""
    return x.movedim(at, 0).reshape(samples, -1, x.shape[-1])


def _optional(x: Tensor | None, samples: int, at: int) -> Tensor | None:
    return None if x is None else samples_first(x, samples, at)


def trim_between_frames(device: torch.device) -> None:
    """Give back what the forwards left between the frames, before anything else needs as much."""
    if device.type == "cpu":
        trim_heap()
