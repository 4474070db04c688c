"""The two loops that go column by column, taken out so that a device can have its own.

A *walk* goes through a run of neighbouring columns, left to right, each changing what later ones of the run
see: once to solve them (columns.py), once per sweep to improve their codes (refine.py). Everything else of
the solver is matmuls, which every device has. There are three walks, and `walk_choice.py` says which runs
where; all of them compute the same numbers:

    torch         a handful of operators per column; short runs, with a matmul from run to run
    cuda graph    the same operators for a long run, recorded once and launched as one (walk_graph.py)
    triton        one kernel launch per run: a tile of rows stays in registers (walk_triton.py)

An accelerator that fuses a product and a sum rounds once where two operators round twice, and one rounding
can decide a tie. The long walks round twice (`subtract_product_`), so that they agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptq_cli.gptq.batch import add_weighted_rows_, diagonal_of, subtract_outer_
from gptq_cli.gptq.grid import Grid

SHORT_RUN = 16
"""Columns of a run where each costs several operators: the matmuls between runs are the faster part."""
LONG_RUN = 128
"""Columns of a run that is one launch."""


def launching_on(X: Tensor) -> AbstractContextManager[object]:
    """Kernels that are not torch's are launched on the current device, wherever their tensors are: make it
    that of `X`."""
    return torch.cuda.device(X.device) if X.is_cuda else nullcontext()


@dataclass(frozen=True, slots=True, eq=False)
class SolveRun:
    """Columns to be solved: their scales are known. `…`: see batch.py."""

    B: Tensor
    """(…, n, N): weights with the feedback of all columns before; used up."""
    U: Tensor
    """(…, n, n): column j holds U_j,: / U_jj below its diagonal."""
    weight: Tensor
    """(…, n): 1 / U_jj², what an error counts in the damped loss."""
    S: Tensor
    """(…, n, N): the scale of every weight."""
    Z: Tensor
    """(…, n, N): its zero."""
    W: Tensor
    """(…, n, N): weights without feedback; becomes D = W - Q."""
    codes: Tensor
    """uint8 (…, n, N): filled in."""
    E: Tensor
    """(…, n, N): filled in, B - Q of every column when its turn came."""
    damped: Tensor
    """(…, N): Σ weight · E² is added."""


@dataclass(frozen=True, slots=True, eq=False)
class SweepRun:
    """Columns of one group whose codes are to be improved."""

    L: Tensor
    """(…, n, N): levels; changed in place."""
    G: Tensor
    """(…, n, N): slope of the damped loss; used up."""
    H: Tensor
    """(…, n, n): damped."""
    s: Tensor
    """(…, N): the group's scale."""
    z: Tensor
    """(…, N): the group's zero."""
    C: Tensor
    """(…, n, N): filled in, the change of every weight."""


class Walk(Protocol):
    """A way through a run of at most `columns` columns."""

    @property
    def name(self) -> str:
        """As in the table above."""
        ...

    @property
    def columns(self) -> int:
        """The longest run."""
        ...

    def solve(self, run: SolveRun, grid: Grid) -> None:
        """Solve the columns of a run."""
        ...

    def sweep(self, run: SweepRun, grid: Grid) -> None:
        """Improve the codes of a run."""
        ...


def subtract_product_(
    C: Tensor,  # (…, m, n); changed in place
    a: Tensor,  # (…, m)
    b: Tensor,  # (…, n)
) -> Tensor:
    """C -= a bᵀ, the product rounded before it is subtracted: on every device the same bits."""
    return C.sub_(a.unsqueeze(-1) * b.unsqueeze(-2))


class TorchWalk:
    """Operators of torch, column after column."""

    name = "torch"

    def __init__(
        self, columns: int = SHORT_RUN, subtract: Callable[[Tensor, Tensor, Tensor], Tensor] = subtract_outer_
    ) -> None:
        self.columns = columns
        self._subtract = subtract

    def solve(self, run: SolveRun, grid: Grid) -> None:
        """See `Walk.solve`."""
        L = torch.empty_like(run.B)
        columns = (X.unbind(-2) for X in (run.B, L, run.E, run.S, run.Z))
        for j, (w, level, error, s, z) in enumerate(zip(*columns, strict=True), start=1):
            grid.levels(w, s, z, out=level)
            torch.addcmul(w, level, s, value=-1, out=error)  # the product is exact: integer times fp16
            if j < L.shape[-2]:
                self._subtract(run.B[..., j:, :], run.U[..., j:, j - 1], error)
        run.W.addcmul_(L, run.S, value=-1)
        run.codes.copy_(L.add_(run.Z))
        add_weighted_rows_(run.damped, run.E.square(), run.weight)

    def sweep(self, run: SweepRun, grid: Grid) -> None:
        """See `Walk.sweep`."""
        s, z = run.s, run.z
        curve = diagonal_of(run.H).unsqueeze(-1) * s.unsqueeze(-2)
        columns = (X.unbind(-2) for X in (run.G, curve, run.L, run.C))
        for j, (slope, bend, level, change) in enumerate(zip(*columns, strict=True), start=1):
            best = grid.clamp_(torch.div(slope, bend).add_(level).round_(), z)
            torch.sub(best, level, out=change).mul_(s)
            level.copy_(best)
            if j < run.L.shape[-2]:
                self._subtract(run.G[..., j:, :], run.H[..., j:, j - 1], change)


def long_torch_walk() -> TorchWalk:
    """What a recorded walk and a kernel must equal, bit for bit."""
    return TorchWalk(LONG_RUN, subtract_product_)
