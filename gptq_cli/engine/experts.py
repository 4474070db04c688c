"""Linears that see a part of the tokens: from their moments to codes, side by side.

The stages of a family (the gate and up of every expert of a block, say) come in batches. Each is solved with
its own Hessian, shrunk towards the pool of its siblings' (`gptq.pool`); stages of one shape are solved in one
call, as many as the schedule allows. A stage that no token reached waits for the last batch of its family,
and is then solved with the pool of all of them. Where the whole family saw no token there is nothing to go
by, and the solver rounds to nearest, with a warning as for every fallback.

The report of a linear has the tokens that it saw. Of experts that saw few of them a run speaks in one line,
when the first is seen and again at the end: `FewTokens`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine.finite import named_error
from gptq_cli.engine.leaf_sums import LeafSums, OwnedSums
from gptq_cli.engine.mixed import solve_mixed
from gptq_cli.engine.shared_solve import Dealt, owners_of
from gptq_cli.engine.stages import Stage
from gptq_cli.engine.wire import Shape
from gptq_cli.errors import NonFinite
from gptq_cli.events import Observer, Warned
from gptq_cli.gptq.moments import StageMoments
from gptq_cli.gptq.pool import Pool, shrink_to, shrink_to_pooled
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_stages
from gptq_cli.model.weights import check_tensor
from gptq_cli.placement.schedule import BlockSchedule
from gptq_cli.ranks.team import ALONE, Team
from gptq_cli.results.run import ExpertsReport, LinearReport
from gptq_cli.wording import names_text

_NAMED = 4
_HINT = "more --samples, or text like that which the model will read, reach more experts"

Weights = Callable[[Stage], list[Tensor]]
"""The weights (N_i, K) of a stage's linears."""
Rows = Callable[[Stage], tuple[int, ...]]
"""N of each linear of a stage."""
Configs = Callable[[Stage], tuple[QuantizeConfig, ...]]
"""The settings of each linear of a stage."""
_Kind = tuple[tuple[int, ...], tuple[QuantizeConfig, ...]]
"""Rows and settings: stages of one kind are solved side by side."""


@dataclass(frozen=True, slots=True, eq=False)
class SolvedStage:
    """A routed stage as codes."""

    stage: Stage
    linears: list[QuantizedLinear]
    tokens: int
    pooled: float
    """The weight of its siblings' tokens in its Hessian, 0 to 1."""
    seconds: float
    """Its share of the time that its batch took."""


class ExpertSolver:
    """Solves the routed stages of one block, batch after batch; keeps a pool for each family."""

    def __init__(
        self, configs: Configs, schedule: BlockSchedule, weights: Weights, rows: Rows, team: Team = ALONE
    ) -> None:
        self._configs, self._rows = configs, rows
        self._schedule = schedule
        self._weights = weights
        self._team = team
        self._pool = Pool()
        self._columns = 0
        self._sums: OwnedSums | None = None
        self._unreached: list[Stage] = []

    def sums(self, leaves: Sequence[int], moments: Mapping[Stage, StageMoments]) -> LeafSums:
        """What adds up the moments of a batch over all ranks: to be finished before `solve`."""
        stages, parts = list(moments), [part for moment in moments.values() for part in moment.parts]
        self._columns = parts[0].in_features

        def owners(tokens: Sequence[int]) -> list[int | None]:
            reached = self._by_kind([stage for stage, seen in zip(stages, tokens, strict=True) if seen])
            found = owners_of([self._shapes(stage) for stage in reached], self._team.size)
            solves = dict(zip(reached, found, strict=True))
            return [solves.get(stage) for stage in stages]

        self._sums = OwnedSums(self._team, leaves, parts, owners)
        return self._sums

    def solve(self, moments: dict[Stage, StageMoments], *, last: bool) -> Iterator[SolvedStage]:
        """Solve the stages of a batch; `moments` is consumed. `last`: of its family.

        Stages come in the order in which they are solved. Raises `NonFinite`, with the names of the linears
        before the message.
        """
        self._columns = next(iter(moments.values())).parts[0].in_features
        tokens = {stage: moment.tokens for stage, moment in moments.items()}
        hessians = self._hessians(moments)
        moments.clear()
        device = self._pool.hessian().device
        self._unreached += [stage for stage in tokens if not tokens[stage]]
        for stage in self._unreached:
            hessians.pop(stage, None)
        reached = self._by_kind([stage for stage in tokens if tokens[stage]])
        columns = self._columns

        def told(stage: Stage, linears: list[QuantizedLinear], seconds: float) -> SolvedStage:
            return SolvedStage(stage, linears, tokens[stage], self._pooled(tokens[stage], columns), seconds)

        work = Dealt(self._shapes, lambda own: self._solved(own, hessians, tokens), told)
        yield from work.solved(self._team, reached, device)
        if last:
            by_pool = Dealt(self._shapes, self._solved_by_pool, self._told_by_pool)
            yield from by_pool.solved(self._team, self._unreached, device)
            self._pool, self._unreached = Pool(), []

    def _hessians(self, moments: Mapping[Stage, StageMoments]) -> dict[Stage, Tensor]:
        """Of the stages whose sums this rank has, shrunk towards the pool, to which this batch is added."""
        pooled = None if self._sums is None else self._sums.pooled
        self._sums = None
        if pooled is None:
            shrunk = shrink_to_pooled(list(moments.values()), self._pool)
            return dict(zip(moments, shrunk, strict=True))
        self._pool.add(pooled.matrix(), pooled.tokens)
        pooled.free()
        own = {stage: moment for stage, moment in moments.items() if moment.parts[0].here}
        return dict(zip(own, shrink_to(self._pool, list(own.values())), strict=True))

    def _kind(self, stage: Stage) -> _Kind:
        return self._rows(stage), self._configs(stage)

    def _by_kind(self, stages: Sequence[Stage]) -> list[Stage]:
        """Those of one kind side by side, in the order in which kinds first come."""
        kinds: dict[_Kind, list[Stage]] = {}
        for stage in stages:
            kinds.setdefault(self._kind(stage), []).append(stage)
        return [stage for alike in kinds.values() for stage in alike]

    def _shapes(self, stage: Stage) -> list[Shape]:
        each = zip(self._rows(stage), self._configs(stage), strict=True)
        return [Shape(rows, self._columns, config.groups(self._columns)) for rows, config in each]

    def _pooled(self, seen: int, columns: int) -> float:
        return columns / (seen + columns) if self._pool.tokens > seen else 0.0

    def _told_by_pool(self, stage: Stage, linears: list[QuantizedLinear], seconds: float) -> SolvedStage:
        return SolvedStage(stage, linears, 0, 1.0 if self._pool.tokens else 0.0, seconds)

    def _solved(
        self, stages: Sequence[Stage], hessians: dict[Stage, Tensor], tokens: Mapping[Stage, int]
    ) -> Iterator[SolvedStage]:
        """Stages that tokens reached, those of one kind side by side; their `hessians` are consumed, and all
        others are dropped."""
        for stage in set(hessians) - set(stages):
            del hessians[stage]
        for (rows, configs), alike in groupby(stages, self._kind):
            waiting = list(alike)
            while waiting:
                size = self._schedule.experts_per_solve(hessians[waiting[0]].shape[0], sum(rows))
                batch, waiting = waiting[:size], waiting[size:]
                yield from self._solved_together(batch, configs, hessians, tokens)

    def _solved_together(
        self,
        stages: Sequence[Stage],
        configs: tuple[QuantizeConfig, ...],
        of_stages: dict[Stage, Tensor],
        tokens: Mapping[Stage, int],
    ) -> Iterator[SolvedStage]:
        """Stages of one kind, each with its Hessian, which is consumed."""
        started = time.perf_counter()
        weights = [self._weights(stage) for stage in stages]
        columns = of_stages[stages[0]].shape[0]
        if len(stages) == 1:
            hessians = of_stages.pop(stages[0]).unsqueeze(0)
        else:
            hessians = of_stages[stages[0]].new_empty(len(stages), columns, columns)
            for place, stage in enumerate(stages):
                hessians[place] = of_stages.pop(stage)
        try:
            if len(set(configs)) == 1:
                solved = quantize_stages(weights, hessians, configs[0])
            else:
                each = zip(weights, hessians, strict=True)
                solved = [solve_mixed(one, hessian, configs) for one, hessian in each]
        except NonFinite:
            for stage, one, hessian in zip(stages, weights, hessians, strict=True):
                self._alone([stage], one, hessian)  # names the one that cannot be solved
            raise
        del hessians, weights
        seconds = (time.perf_counter() - started) / len(stages)
        for stage in stages:
            seen = tokens[stage]
            yield SolvedStage(stage, solved.pop(0), seen, self._pooled(seen, columns), seconds)

    def _solved_by_pool(self, stages: Sequence[Stage]) -> Iterator[SolvedStage]:
        """The stages that no token reached: one Hessian, so their rows are stacked like those of one
        stage."""
        waiting = list(stages)
        while waiting:
            started = time.perf_counter()
            hessian = self._pool.hessian()
            size = self._schedule.experts_per_solve(hessian.shape[0], sum(self._rows(waiting[0])))
            batch, waiting = waiting[:size], waiting[size:]
            weights = [self._weights(stage) for stage in batch]
            solved = self._alone(batch, [one for stage in weights for one in stage], hessian)
            seconds = (time.perf_counter() - started) / len(batch)
            for stage, own in zip(batch, weights, strict=True):
                yield self._told_by_pool(stage, [solved.pop(0) for _ in own], seconds)

    def _alone(
        self, stages: Sequence[Stage], weights: Sequence[Tensor], hessian: Tensor
    ) -> list[QuantizedLinear]:
        try:
            configs = [config for stage in stages for config in self._configs(stage)]
            return solve_mixed(weights, hessian, configs)
        except NonFinite as error:
            linears = [f"{self._schedule.name}.{name}" for stage in stages for name in stage.linears]
            for name, weight in zip(linears, weights, strict=True):
                check_tensor(f"{name}.weight", weight)  # says where it is not finite
            raise named_error(error, linears, weights) from error


class FewTokens:
    """Warns of experts that saw fewer tokens than they have columns: when first seen, and at the end."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._linears: list[LinearReport] = []
        self._first = ""

    def block(self, name: str, linears: Iterable[LinearReport], *, told: bool = True) -> None:
        """The block `name` is finished; not `told`: by an earlier run, which said so."""
        routed = [linear for linear in linears if linear.routed]
        self._linears += routed
        found = ExpertsReport.of(routed)
        if not self._first and found is not None and found.few:
            self._first = name
            if not told:
                return
            self._observer(
                Warned(f"{name}: {_few_text(found)} (said once; all blocks are counted at the end)", _HINT)
            )

    def end(self) -> None:
        """All blocks are finished."""
        found = ExpertsReport.of(self._linears)
        if found is not None and found.few:
            self._observer(Warned(f"experts with few tokens: {_few_text(found)}", _HINT))


def _few_text(found: ExpertsReport) -> str:
    """`14 of 256 experts saw fewer tokens than they have columns, …; no token reached 2 of them: …`."""
    text = (
        f"{found.few} of {found.experts} experts saw fewer calibration tokens than they have columns"
        f" (the least {found.least_tokens}): their Hessians are mostly those of all experts of their block"
    )
    if not found.unreached:
        return text
    return f"{text}; no token reached {len(found.unreached)} of them: {names_text(found.unreached, _NAMED)}"
