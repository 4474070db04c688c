"""Naming the sample that brought NaN or infinity.

A Hessian shows that something was not finite: every value lands on its diagonal, squared. So after each
micro-batch one number is read there, K additions instead of a pass over the activations, and only when it is
not finite are the activations searched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.errors import NonFinite


def blame_sample(
    x: Tensor,  # (batch, …), the micro-batch after which the Hessian was not finite
    samples: Sequence[int],  # the calibration samples that x is made of
    block: str,
    linear: str,
) -> NonFinite:
    """The error that names the block, the linear and the first sample of `x` that is not finite.

    When every value is finite, their squares overflowed in float32.
    """
    finite = torch.isfinite(x).flatten(1).all(dim=1)
    if bool(finite.all()):
        largest = float(x.abs().max())
        return NonFinite(
            f"the input of {linear!r} in block {block!r} reaches {largest:.3g}: its square overflows float32",
            hint="the model overflows on this text: leave out "
            + ("sample " if len(samples) == 1 else "the samples ")
            + ", ".join(str(number) for number in samples),
        )
    place = int((~finite).nonzero()[0])
    sample = samples[min(place, len(samples) - 1)]
    return NonFinite(
        f"the input of {linear!r} in block {block!r} is not finite for calibration sample {sample}",
        hint="run with --dtype float32 or bfloat16, or leave that sample out",
    )
