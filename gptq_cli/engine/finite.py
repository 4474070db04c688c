"""Naming the sample that brought NaN or infinity.

A Hessian shows that something was not finite: every value lands on its diagonal, squared. The cross
moment with the dense stream shows it in any of its columns. So after each micro-batch one number of each is
read, K additions instead of a pass over the activations, and only when it is not finite are those searched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.errors import NonFinite


def non_finite_error(
    streams: Sequence[Tensor | None],  # each (batch, tokens, K), or (tokens, K) where tokens are routed
    samples: Sequence[int],  # the calibration samples that make up the micro-batch
    block: str,
    linear: str,
) -> NonFinite:
    """The error that names the block, the linear and the first sample that is not finite.

    `streams` are what went into the moments: the input, and with a dense stream its input and the difference
    of the residuals. Where tokens are routed, which sample one came from is lost, and all are named. When
    every value is finite, their squares overflowed in float32.
    """
    tensors = [stream for stream in streams if stream is not None]
    x = next((tensor for tensor in tensors if not bool(torch.isfinite(tensor).all())), None)
    if x is None:
        largest = max(float(tensor.abs().max()) for tensor in tensors)
        return NonFinite(
            f"the input of {linear!r} in block {block!r} reaches {largest:.3g}: its square overflows float32",
            hint="the model overflows on this text: leave out " + _named(samples),
        )
    if x.ndim > 2:
        bad = ~torch.isfinite(x).flatten(1).all(dim=1)
        samples = [samples[int(bad.nonzero()[0])]]
    return NonFinite(
        f"the input of {linear!r} in block {block!r} is not finite for {_named(samples)} of the calibration",
        hint="run with --dtype float32 or bfloat16, or leave that sample out",
    )


def _named(samples: Sequence[int]) -> str:
    return ("sample " if len(samples) == 1 else "one of the samples ") + ", ".join(map(str, samples))
