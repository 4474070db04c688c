"""Up to how many tokens the fused int4 kernel is faster than dequantize-and-GEMM, measured where it will run.

The fused kernels cost about the same for every further token; a GEMM costs little more for many tokens than
for one, but only after the weight was made dense. Where the two lines cross depends on the machine (AMX,
AVX-512, tensor cores) and on the shape, so both are timed at two numbers of tokens, on at most 1024 columns
of the first linear of each shape class: some milliseconds a class.

The crossing is clamped to 1..32 tokens. Decoding then always takes the fused kernel, and all but the shortest
prompts and windows never do, so that both give the same numbers whatever was measured on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from gptq_cli.devices.accelerators import synchronize
from gptq_cli.gptq.matmul import fast_matmul_supported
from gptq_cli.inference.kernels import Held, Kernel
from gptq_cli.inference.scratch import Fresh, Scratch
from gptq_cli.timing import fastest

MIN_ROWS, MAX_ROWS = 1, 32
PROBE_COLUMNS = 1024
_FEW, _MANY = 2, 32
_REPEATS = 3

ShapeClass = tuple[str, str, torch.dtype, int, int, int, int, bool]


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for one operation, and put the number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Crossovers:
    """The measured crossings of one load, one a shape class."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: how many the model will run with; None: as many as torch uses now."""
        self._known: dict[ShapeClass, int] = {}
        self._threads = threads

    def max_fused_tokens(self, kernel: Kernel, held: Held) -> int:
        """The largest number of tokens for which `kernel.fused` is to be used."""
        if not kernel.can_fuse:
            return 0
        device = held["packed"].device
        columns = min(PROBE_COLUMNS, kernel.columns)
        key = (
            kernel.name,
            str(device),
            kernel.dtype,
            kernel.rows,
            columns,
            kernel.group,
            kernel.planes,
            kernel.shifted,
        )
        if key not in self._known:
            with intra_op_threads(self._threads or torch.get_num_threads()):
                self._known[key] = probe(kernel, held, columns)
        return self._known[key]


def probe(kernel: Kernel, held: Held, columns: int) -> int:
    """Time both ways on `columns` columns and return the crossing, MIN_ROWS to MAX_ROWS."""
    part = kernel.restrict(held, columns)
    device = held["packed"].device

    def fused(x: Tensor) -> None:
        kernel.fused(x if kernel.planes == 1 else torch.cat([x, x], 1), part)

    memory = Scratch() if device.type == "cpu" else Fresh()

    dtype = kernel.dtype if fast_matmul_supported(kernel.dtype, device.type) else torch.float32

    def dequantized(x: Tensor) -> None:
        torch.mm(x.to(dtype), kernel.dense(part, 0, columns, dtype, memory)).to(kernel.dtype)

    inputs = [torch.ones(rows, kernel.rows, dtype=kernel.dtype, device=device) for rows in (_FEW, _MANY)]
    fused_seconds = [_best(partial(fused, x), device) for x in inputs]
    dense_seconds = [_best(partial(dequantized, x), device) for x in inputs]
    return crossing(fused_seconds, dense_seconds)


def crossing(fused_seconds: list[float], dense_seconds: list[float]) -> int:
    """Where two straight lines through the times at 2 and at 32 tokens meet, clamped to 1..32."""
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
