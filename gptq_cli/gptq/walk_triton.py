"""A run of columns as one Triton kernel.

A program holds a tile of all columns of the run and some rows in registers, in fp32, and walks it: select
the column that is due, round it, subtract its error from the columns to its right. Rows never meet, so there
is nothing to wait for; a second dimension of the grid has the stages of a batch. Tensors are transposed as
everywhere in this package, so that the rows of a tile lie side by side in memory.

The codes are those of `walk.long_torch_walk()`, bit for bit:

- `tl.div_rn` divides as IEEE says; `/` is approximate on a card,
- products and sums are not fused (`enable_fp_fusion=False`): two roundings, as two operators make,
- adding and subtracting 1.5 · 2²³ rounds half to even, as torch.round does, up to 2²²; beyond that every
  level is clamped anyway,
- the due column is picked by a masked sum, of which one term is not 0,
- a weight that is not a number stays one, and gets code 0, as in torch.

Only the damped loss differs in its last bits: it is summed column after column.

The same source runs in Triton's interpreter on a CPU (TRITON_INTERPRET=1 before the import), and it can be
compiled for a card that is not there: that is how the default tests prove it. The sizes of a tile are
guesses: none has been tuned on a card.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gptq_cli.gptq.grid import Grid
from gptq_cli.gptq.walk import LONG_RUN, SolveRun, SweepRun, launching_on

_TILE_ROWS, _WARPS = 32, 4
_LEAST_COLUMNS = 16


@triton.jit
def _nearest_level(x, low, high):  # type: ignore[no-untyped-def]
    rounded = (x + 12582912.0) - 12582912.0
    return tl.clamp(rounded, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _column(tile, columns, k):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where(columns[:, None] == k, tile, 0.0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _solve(  # type: ignore[no-untyped-def]
    B, U, weight, S, Z, W, codes, E, damped,
    B_stage, U_stage, U_row, U_column, weight_stage, S_stage, Z_stage, W_stage, codes_stage, E_stage,
    damped_stage,
    N, low, high, zero, top,
    n: tl.constexpr, SYM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    stage = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    there = rows < N
    due = columns < n
    tile = tl.load(
        B + stage * B_stage + columns[:, None] * N + rows[None, :],
        mask=due[:, None] & there[None, :],
        other=0.0,
    )
    loss = tl.load(damped + stage * damped_stage + rows, mask=there, other=0.0)
    for k in range(n):
        place = k * N + rows
        w = _column(tile, columns, k)
        s = tl.load(S + stage * S_stage + place, mask=there, other=1.0)
        if SYM:
            level = _nearest_level(tl.div_rn(w, s), low, high)
            code = level + zero
        else:
            z = tl.load(Z + stage * Z_stage + place, mask=there, other=0.0)
            level = _nearest_level(tl.div_rn(w, s), -z, top - z)
            code = level + z
        q = level * s
        e = w - q
        u = tl.load(U + stage * U_stage + columns * U_row + k * U_column, mask=due, other=0.0)
        tile = tl.where(columns[:, None] > k, tile - u[:, None] * e[None, :], tile)
        loss += tl.load(weight + stage * weight_stage + k) * (e * e)
        original = tl.load(W + stage * W_stage + place, mask=there, other=0.0)
        tl.store(W + stage * W_stage + place, original - q, mask=there)
        tl.store(E + stage * E_stage + place, e, mask=there)
        code = tl.where(code == code, code, 0.0)
        tl.store(codes + stage * codes_stage + place, code.to(tl.uint8), mask=there)
    tl.store(damped + stage * damped_stage + rows, loss, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]
    L, G, H, s, z, C,
    L_stage, G_stage, H_stage, H_row, H_column, s_stage, z_stage, C_stage,
    N, low, high, top,
    n: tl.constexpr, SYM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    stage = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    there = rows < N
    due = columns < n
    tile = tl.load(
        G + stage * G_stage + columns[:, None] * N + rows[None, :],
        mask=due[:, None] & there[None, :],
        other=0.0,
    )
    scale = tl.load(s + stage * s_stage + rows, mask=there, other=1.0)
    zero = tl.load(z + stage * z_stage + rows, mask=there, other=0.0)
    for k in range(n):
        place = k * N + rows
        level = tl.load(L + stage * L_stage + place, mask=there, other=0.0)
        curve = tl.load(H + stage * H_stage + k * (H_row + H_column)) * scale
        lowest = tl.div_rn(_column(tile, columns, k), curve) + level
        best = _nearest_level(lowest, low, high) if SYM else _nearest_level(lowest, -zero, top - zero)
        change = (best - level) * scale
        h = tl.load(H + stage * H_stage + columns * H_row + k * H_column, mask=due, other=0.0)
        tile = tl.where(columns[:, None] > k, tile - h[:, None] * change[None, :], tile)
        tl.store(L + stage * L_stage + place, best, mask=there)
        tl.store(C + stage * C_stage + place, change, mask=there)


class TritonWalk:
    """One launch for a run. Tensors are fp32, a row of a tile lies in neighbouring numbers."""

    name = "triton"
    columns = LONG_RUN

    def __init__(self, tile_rows: int = _TILE_ROWS) -> None:
        self._rows = tile_rows

    def solve(self, run: SolveRun, grid: Grid) -> None:
        """See `Walk.solve`."""
        B, S, Z, W, codes, E = map(_tiles, (run.B, run.S, run.Z, run.W, run.codes, run.E))
        U, weight, damped = _batched(run.U, 3), _batched(run.weight, 2), _batched(run.damped, 2)
        stages, n, N = B.shape
        with launching_on(B):
            _solve[self._programs(N, stages)](
                B, U, weight, S, Z, W, codes, E, damped,
                B.stride(0), *U.stride(), weight.stride(0), S.stride(0), Z.stride(0), W.stride(0),
                codes.stride(0), E.stride(0), damped.stride(0),
                N, float(-grid.half), float(grid.half - 1), float(grid.half), float(grid.top),
                **self._options(n, grid),
            )  # fmt: skip

    def sweep(self, run: SweepRun, grid: Grid) -> None:
        """See `Walk.sweep`."""
        L, G, C = map(_tiles, (run.L, run.G, run.C))
        H, s, z = _batched(run.H, 3), _batched(run.s, 2), _batched(run.z, 2)
        stages, n, N = L.shape
        with launching_on(L):
            _sweep[self._programs(N, stages)](
                L, G, H, s, z, C,
                L.stride(0), G.stride(0), *H.stride(), s.stride(0), z.stride(0), C.stride(0),
                N, float(-grid.half), float(grid.half - 1), float(grid.top),
                **self._options(n, grid),
            )  # fmt: skip

    def _programs(self, N: int, stages: int) -> tuple[int, int]:
        return -(-N // self._rows), stages

    def _options(self, n: int, grid: Grid) -> dict[str, Any]:
        columns = max(_LEAST_COLUMNS, 1 << (n - 1).bit_length())
        return {
            "n": n,
            "SYM": grid.sym,
            "COLUMNS": columns,
            "ROWS": self._rows,
            "num_warps": _WARPS,
            "enable_fp_fusion": False,
        }


def _batched(X: Tensor, dimensions: int) -> Tensor:
    """With a dimension for the stages, also where there is one."""
    return X.unsqueeze(0) if X.ndim < dimensions else X


def _tiles(X: Tensor) -> Tensor:  # (stages, n, N)
    """The same for what is read in tiles. Raises `ValueError` for a layout that the kernels do not read."""
    X = _batched(X, 3)
    if X[0].numel() and not X[0].is_contiguous():
        raise ValueError(f"strides {X.stride()} of {tuple(X.shape)}: rows do not lie side by side")
    return X
