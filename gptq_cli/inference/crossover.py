"""Up to how many tokens the fused int4 kernel beats dequantize-and-GEMM, measured on the device itself.

The time of a fused kernel grows with every token. A GEMM takes little more time for many tokens than for one,
but the weight must be made dense first. Where the two lines cross depends on the machine (AMX, AVX-512,
tensor cores) and on the shape, so both are timed for 2 and for 32 tokens, on at most 1024 columns of the
first linear of each shape class. That takes a few milliseconds per class.

The crossing is clamped to 1..32 tokens. Decoding therefore always uses the fused kernel, and all but the
shortest prompts and windows never do: a timing disturbed by other processes does not change their results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from gptq_cli.devices.accelerators import synchronize
from gptq_cli.gptq.matmul import fast_matmul_supported
from gptq_cli.inference.kernels import Buffers, Kernel
from gptq_cli.inference.scratch import Fresh, Scratch
from gptq_cli.timing import fastest

MIN_ROWS, MAX_ROWS = 1, 32
PROBE_COLUMNS = 1024
_FEW, _MANY = 2, 32
_REPEATS = 3

ShapeClass = tuple[str, str, torch.dtype, int, int, int, int, bool]


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads per operation inside the scope, and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Crossovers:
    """The measured crossings of one load, one per shape class."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: the number the model will run with; None: as many as torch uses now."""
        self._known: dict[ShapeClass, int] = {}
        self._threads = threads

    def max_fused_tokens(self, kernel: Kernel, buffers: Buffers) -> int:
        """The largest number of tokens for which `kernel.fused` is to be used."""
        if not kernel.can_fuse:
            return 0
        device = buffers["packed"].device
        columns = min(PROBE_COLUMNS, kernel.columns)
        key = (
            kernel.name,
            str(device),
            kernel.dtype,
            kernel.rows,
            columns,
            kernel.group,
            kernel.nibbles_per_code,
            kernel.shifted,
        )
        if key not in self._known:
            with intra_op_threads(self._threads or torch.get_num_threads()):
                self._known[key] = probe(kernel, buffers, columns)
        return self._known[key]


def probe(kernel: Kernel, buffers: Buffers, columns: int) -> int:
    """Time both forms on `columns` columns and return the crossing, MIN_ROWS to MAX_ROWS."""
    part = kernel.restrict(buffers, columns)
    device = buffers["packed"].device

    def fused(x: Tensor) -> None:
        kernel.fused(x if kernel.nibbles_per_code == 1 else torch.cat([x, x], 1), part)

    memory = Scratch() if device.type == "cpu" else Fresh()

    dtype = kernel.dtype if fast_matmul_supported(kernel.dtype, device.type) else torch.float32

    def dequantized(x: Tensor) -> None:
        torch.mm(x.to(dtype), kernel.dense(part, 0, columns, dtype, memory)).to(kernel.dtype)

    inputs = [torch.ones(rows, kernel.rows, dtype=kernel.dtype, device=device) for rows in (_FEW, _MANY)]
    fused_seconds = [_best(partial(fused, x), device) for x in inputs]
    dense_seconds = [_best(partial(dequantized, x), device) for x in inputs]
    return crossing(fused_seconds, dense_seconds)


def crossing(fused_seconds: list[float], dense_seconds: list[float]) -> int:
    """Where the two straight lines through the times at 2 and at 32 tokens meet, clamped to 1..32."""
    span = _MANY - _FEW
    fused_slope = (fused_seconds[1] - fused_seconds[0]) / span
    dense_slope = (dense_seconds[1] - dense_seconds[0]) / span
    head_start = dense_seconds[0] - fused_seconds[0]
    if fused_slope <= dense_slope:
        return MAX_ROWS if head_start > 0 else MIN_ROWS
    return max(MIN_ROWS, min(MAX_ROWS, int(_FEW + head_start / (fused_slope - dense_slope))))


def _best(work: Callable[[], None], device: torch.device) -> float:
    work()
    return fastest(work, attempts=_REPEATS, settle=lambda: synchronize(device))
