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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine.mixed import solve_mixed
from gptq_cli.engine.stages import Stage
from gptq_cli.errors import NonFinite
from gptq_cli.events import Observer, Warned
from gptq_cli.gptq.moments import StageMoments
from gptq_cli.gptq.pool import Pool, shrink_to_pooled
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_stages
from gptq_cli.model.weights import check_tensor
from gptq_cli.placement.schedule import BlockSchedule
from gptq_cli.results.run import ExpertsReport, LinearReport
from gptq_cli.wording import names_text

_NAMED = 4
_HINT = "more --samples, or text like that which the model will read, reach more experts"

Weights = Callable[[Stage], list[Tensor]]
"""The weights (N_i, K) of a stage's linears."""
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

    def __init__(self, configs: Configs, schedule: BlockSchedule, weights: Weights) -> None:
        self._configs = configs
        self._schedule = schedule
        self._weights = weights
        self._pool = Pool()
        self._unreached: list[Stage] = []

    def solve(self, moments: dict[Stage, StageMoments], *, last: bool) -> Iterator[SolvedStage]:
        """Solve the stages of a batch; `moments` is consumed. `last`: of its family.

        Stages come in the order in which they are solved. Raises `NonFinite`, with the names of the linears
        before the message.
        """
        tokens = {stage: moment.tokens for stage, moment in moments.items()}
        hessians = shrink_to_pooled(list(moments.values()), self._pool)
        moments.clear()
        kinds: dict[_Kind, list[tuple[Stage, list[Tensor], Tensor]]] = {}
        for stage in tokens:
            hessian = hessians.pop(0)
            if tokens[stage]:
                weights = self._weights(stage)
                rows = tuple(weight.shape[0] for weight in weights)
                kind = (rows, self._configs(stage))
                kinds.setdefault(kind, []).append((stage, weights, hessian))
            else:
                self._unreached.append(stage)
            del hessian
        for rows, configs in list(kinds):
            alike = kinds.pop((rows, configs))
            while alike:
                size = self._schedule.experts_per_solve(alike[0][2].shape[0], sum(rows))
                batch = [alike.pop(0) for _ in range(min(size, len(alike)))]
                yield from self._solved(batch, configs, tokens)
        if last:
            yield from self._solved_by_pool()
            self._pool, self._unreached = Pool(), []

    def _solved(
        self,
        batch: list[tuple[Stage, list[Tensor], Tensor]],
        configs: tuple[QuantizeConfig, ...],
        tokens: dict[Stage, int],
    ) -> Iterator[SolvedStage]:
        """Stages of one kind, each with its weights and its Hessian; `batch` is consumed."""
        started = time.perf_counter()
        columns = batch[0][2].shape[0]
        stages = [stage for stage, _, _ in batch]
        weights = [one for _, one, _ in batch]
        if len(batch) == 1:
            hessians = batch.pop()[2].unsqueeze(0)
        else:
            hessians = batch[0][2].new_empty(len(batch), columns, columns)
            for place in range(len(batch)):
                hessians[place] = batch.pop(0)[2]
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
            pooled = columns / (seen + columns) if self._pool.tokens > seen else 0.0
            yield SolvedStage(stage, solved.pop(0), seen, pooled, seconds)

    def _solved_by_pool(self) -> Iterator[SolvedStage]:
        """The stages that no token reached: one Hessian, so their rows are stacked like those of one
        stage."""
        while self._unreached:
            started = time.perf_counter()
            hessian = self._pool.hessian()
            rows = sum(weight.shape[0] for weight in self._weights(self._unreached[0]))
            size = self._schedule.experts_per_solve(hessian.shape[0], rows)
            batch, self._unreached = self._unreached[:size], self._unreached[size:]
            weights = [self._weights(stage) for stage in batch]
            solved = self._alone(batch, [one for stage in weights for one in stage], hessian)
            seconds = (time.perf_counter() - started) / len(batch)
            for stage, own in zip(batch, weights, strict=True):
                linears = [solved.pop(0) for _ in own]
                yield SolvedStage(stage, linears, 0, 1.0 if self._pool.tokens else 0.0, seconds)

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
            names = ", ".join(linears)
            raise NonFinite(f"{names}: {error.message}", hint=error.hint) from error


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
