"""Solving together: each rank has some rows of a stage, or some of the stages that are solved side by side.

Rows of a stage are independent once H is known, and every rank has it. So each solves its own rows, and gets
the codes of all others. Then every rank has the same linears, and dequantizes them alike. Who factorises H:
`engine.stage_factors`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine.mixed import solve_mixed
from gptq_cli.engine.wire import Shape, from_bytes, joined, to_bytes, wire_bytes
from gptq_cli.gptq.choice import StepChoice
from gptq_cli.gptq.factor import Factor
from gptq_cli.gptq.feedback import OutputMoment
from gptq_cli.gptq.goal import Part
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.ranks.leaves import Piece, dealt, pieces_of
from gptq_cli.ranks.team import Team


def exchanged(
    team: Team, own: Sequence[QuantizedLinear], shapes: Sequence[Sequence[Shape]], device: torch.device
) -> list[list[QuantizedLinear]]:
    """The linears of every rank; `shapes`: of those of every rank, `own`: this one's."""
    if team.size == 1:
        return [list(own)]
    flat = team.exchanged(to_bytes(own, device), [wire_bytes(of_rank) for of_rank in shapes])
    return [from_bytes(part, of_rank) for part, of_rank in zip(flat, shapes, strict=True)]


@dataclass(frozen=True, slots=True)
class StageShare:
    """The rows of a stage, shared out among the ranks."""

    team: Team
    weights: Sequence[Tensor]
    """(N_i, K) of each linear of the stage."""
    pieces: list[list[Piece]]
    """Of every rank."""

    @classmethod
    def of(cls, team: Team, weights: Sequence[Tensor]) -> StageShare:
        """Every rank gets about as many of the stacked rows."""
        return cls(team, weights, pieces_of([weight.shape[0] for weight in weights], team.size))

    @property
    def _own(self) -> list[Piece]:
        return self.pieces[self.team.rank]

    @property
    def part(self) -> Part:
        """Which of the stacked rows are this rank's."""
        before = sum(piece.rows for pieces in self.pieces[: self.team.rank] for piece in pieces)
        lengths = tuple(piece.rows for piece in self._own)
        return Part(slice(before, before + sum(lengths)), lengths)

    def whole(self, step: StepChoice) -> StepChoice:
        """The step of all rows, from that of this rank's."""
        if self.team.size == 1:
            return step
        own = sum(float(rows.float().square().sum()) for rows in self._rows())
        steps = self.team.gathered((step, own))
        size = sum(norm for _, norm in steps) or 1.0
        moved = math.sqrt(sum(one.moved**2 * norm for one, norm in steps) / size)
        return replace(step, moved=moved, bounded_rows=sum(one.bounded_rows for one, _ in steps))

    def _rows(self) -> list[Tensor]:
        return [self.weights[piece.linear][piece.start : piece.stop] for piece in self._own]

    def solve(
        self,
        hessian: Tensor,  # (K, K)
        configs: Sequence[QuantizeConfig],  # of each linear
        goals: Sequence[Tensor] | None,  # of this rank's pieces
        factor: Factor | None,  # of the Hessian, where a rank made it for all
        outputs: Sequence[OutputMoment | None] = (),  # of each linear, where one process does all
    ) -> list[QuantizedLinear]:
        """The linears of the stage, solved by all ranks. Raises what `quantize_linears` raises."""
        own = self._rows()
        own_configs = [configs[piece.linear] for piece in self._own]
        found = solve_mixed(own, hessian, own_configs, goals, factor, outputs) if own else []
        columns = hessian.shape[0]
        shapes = [
            [Shape(piece.rows, columns, configs[piece.linear].groups(columns)) for piece in pieces]
            for pieces in self.pieces
        ]
        of_ranks = exchanged(self.team, found, shapes, hessian.device)
        of_linears: list[list[QuantizedLinear]] = [[] for _ in self.weights]
        for pieces, linears in zip(self.pieces, of_ranks, strict=True):
            for piece, linear in zip(pieces, linears, strict=True):
                of_linears[piece.linear].append(linear)
        return [joined(parts) for parts in of_linears]


class Solved(Protocol):
    """What is known of an item that was solved."""

    @property
    def linears(self) -> list[QuantizedLinear]:
        """Its linears as codes."""
        ...


def owners_of(items: Sequence[Sequence[Shape]], ranks: int) -> list[int]:
    """The rank that solves each item of so many linears."""
    return dealt([float(sum(shape.rows * shape.columns for shape in item)) for item in items], ranks)


Item = TypeVar("Item")
SolvedItem = TypeVar("SolvedItem", bound=Solved)


@dataclass(frozen=True, slots=True)
class Dealt(Generic[Item, SolvedItem]):
    """Pieces of work that are dealt out, each to one rank."""

    shapes: Callable[[Item], Sequence[Shape]]
    """Of its linears, solved."""
    solve: Callable[[list[Item]], Iterable[SolvedItem]]
    """Solves those that it is given, in their order."""
    told: Callable[[Item, list[QuantizedLinear], float], SolvedItem]
    """What is known of one that another rank solved, with its share of the seconds that all took."""

    def solved(self, team: Team, items: Sequence[Item], device: torch.device) -> Iterator[SolvedItem]:
        """Every item, solved; in the same order on every rank."""
        if team.size == 1:
            yield from self.solve(list(items))
            return
        started = time.perf_counter()
        owners = owners_of([self.shapes(item) for item in items], team.size)
        parts: list[list[Item]] = [[] for _ in range(team.size)]
        for item, owner in zip(items, owners, strict=True):
            parts[owner].append(item)
        own = [linear for solved in self.solve(parts[team.rank]) for linear in solved.linears]
        shapes = [[shape for item in part for shape in self.shapes(item)] for part in parts]
        of_ranks = exchanged(team, own, shapes, device)
        seconds = (time.perf_counter() - started) / max(1, len(items))
        for part, linears in zip(parts, of_ranks, strict=True):
            for item in part:
                yield self.told(item, [linears.pop(0) for _ in self.shapes(item)], seconds)
