"""Naming the sample that brought NaN or infinity.

A Hessian shows that something was not finite: every value lands on its diagonal, squared. The cross
moment with the dense stream shows it in any of its columns. So after each micro-batch one bool of each is
noted, for K additions instead of a pass over the activations. It stays on the device: reading it would make
the host wait for the device, micro-batch after micro-batch. All are read when a stage is collected, and only
where one is False are the activations looked at again, and searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gptq_cli.engine.linear_report import dense_hint
from gptq_cli.errors import NonFinite, WeightTooLarge

Place = TypeVar("Place")

_SQUARES_FIT = 1e12
"""Squares of smaller values do not reach float32's end, for any number of tokens."""


class FiniteNotes(Generic[Place]):
    """For each micro-batch, or stage and micro-batch, whether everything up to it was finite."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._finite: list[Tensor] = []

    def add(self, place: Place, finite: Tensor) -> None:
        """After `place` the sums are `finite`: a bool, on the device."""
        self._places.append(place)
        self._finite.append(finite)

    def first_bad(self) -> Place | None:
        """The place that brought the first value which is not finite; None where there is none. One read
        from the device."""
        if not self._finite:
            return None
        answers = torch.stack(self._finite).tolist()
        return next((place for place, good in zip(self._places, answers, strict=True) if not good), None)


def named_error(
    error: NonFinite,
    names: Sequence[str],
    weights: Sequence[Tensor],  # (N_i, K) of each linear
    *,
    head: bool = False,
) -> NonFinite:
    """`error` with the linears that it is about; of weights that are too large, the one, and the way out."""
    if isinstance(error, WeightTooLarge):
        sizes = [float(weight.abs().max()) for weight in weights]
        # with mixed bits it need not be the largest: more bits reach further
        name = names[sizes.index(error.reached if error.reached in sizes else max(sizes))]
        return WeightTooLarge(f"{name}: {error.message}", hint=dense_hint(name, head=head))
    return NonFinite(f"{', '.join(names)}: {error.message}", hint=error.hint)


def non_finite_error(
    streams: Sequence[Tensor | None],  # each (batch, tokens, K), or (tokens, K) where tokens are routed
    samples: Sequence[int],  # the calibration samples that make up the micro-batch
    block: str,
    linear: str,
) -> NonFinite:
    """The error that names the block, the linear and the first sample that is not finite.

    `streams` are what went into the moments: the input, and with a dense stream its input. Where tokens are
    routed, which sample one came from is lost, and all are named. When every value is finite, their squares
    overflowed in float32; where they are too small for that, it was the residual that the linear's output is
    added to, which is not kept.
    """
    tensors = [stream for stream in streams if stream is not None]
    x = next((tensor for tensor in tensors if not bool(torch.isfinite(tensor).all())), None)
    if x is None:
        largest = max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
        if largest < _SQUARES_FIT:
            return NonFinite(
                f"the residual beside {linear!r} in block {block!r} is not finite for {_named(samples)} of "
                "the calibration",
                hint="run with --dtype float32 or bfloat16, or leave that sample out",
            )
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
