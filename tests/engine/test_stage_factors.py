"""Factorisations that ranks share give the bits of those that each makes for itself.

Ranks are threads here, one of which works at a time: the switches of `gptq.matmul` are those of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.engine.stage_factors import StageFactors
from gptq_cli.gptq.choice import StepChoice, choose_step, damp_ladder
from gptq_cli.gptq.factor import factorize
from gptq_cli.gptq.goal import Part
from gptq_cli.gptq.moments import StageMoments
from gptq_cli.gptq.rounding import column_order
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.gptq.triangle import triangle_numbers
from gptq_cli.planning.cases import Work
from gptq_cli.planning.factors import factor_plan
from gptq_cli.ranks.leaves import row_ranges
from gptq_cli.ranks.team import Alone

T = TypeVar("T")
K, N = 24, 48
CONFIG = QuantizeConfig(group_size=8)


@dataclass(frozen=True)
class Thread(Alone):
    """One rank of several."""

    met: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Held by the one that works."""
    words: list[Any] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    """Numbers that each rank has sent."""

    def gathered(self, value: T) -> list[T]:
        self.words[self.rank] = value
        self._meet()
        found = list(self.words)
        self._meet()
        return found

    def carry(self, piece: Tensor, source: int) -> None:
        value = self.gathered(piece.clone())[source]
        if self.rank == source:
            self.sent[source] += piece.numel()
        else:
            piece.copy_(value)

    def _meet(self) -> None:
        self.turn.release()
        try:
            self.met.wait(30)
        finally:
            self.turn.acquire()


def by_ranks(size: int, work: Callable[[Thread], T]) -> tuple[list[T], list[int]]:
    """What `work` gives on each rank, and the numbers that each has sent."""
    met, turn, sent = threading.Barrier(size), threading.Lock(), [0] * size
    words: list[Any] = [None] * size

    def run(team: Thread) -> T:
        with turn:
            return work(team)

    teams = [Thread(0, rank, size, met, turn, words, sent) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(run, team) for team in teams]], sent


def moments_of(samples: int = 16) -> tuple[StageMoments, Tensor]:
    """The moments of a stage whose input lacks something that follows from it, and its weight."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 20, K, generator=random)
    dense = x + 0.3 * x @ torch.randn(K, K, generator=random) / K**0.5
    moments = StageMoments(K, torch.device("cpu"), samples=samples, dense=True)
    moments.add(x, dense, 0)
    return moments, torch.randn(N, K, generator=random)


@dataclass(frozen=True)
class Found:
    goals: list[Tensor]
    choice: StepChoice
    codes: Tensor


def solved(team: Alone, damp_percent: float) -> Found:
    config = QuantizeConfig(group_size=8, damp_percent=damp_percent)
    moments, weight = moments_of()
    hessian = moments.hessian()
    rows = row_ranges(N, team.size)[team.rank]
    part = Part(slice(rows.start, rows.stop), (len(rows),))
    factors = StageFactors(team, hessian, config)
    goals, choice = moments.goal([weight], hessian, damp_percent, part=part, factors=factors)
    assert goals is not None
    own = weight[rows.start : rows.stop]
    factor = factors.for_solve()
    codes = quantize_linears([own], hessian, config, goals=goals, factor=factor)[0].codes if rows else own
    return Found(goals, choice, codes)


@pytest.mark.parametrize("damp_percent", [0.05, 0.9])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 8, 9])
def test_goals_and_codes_do_not_depend_on_who_factorises(size: int, damp_percent: float) -> None:
    alone = solved(Alone(), damp_percent)
    found, sent = by_ranks(size, lambda team: solved(team, damp_percent))
    assert torch.equal(torch.cat([one.goals[0] for one in found]), alone.goals[0])
    assert torch.equal(torch.cat([one.codes for one in found if len(one.codes)]), alone.codes)
    assert {one.choice.alpha for one in found} == {alone.choice.alpha}
    assert {one.choice.damp_percent for one in found} == {alone.choice.damp_percent}
    quantize = QuantizeConfig(damp_percent=damp_percent)
    plan = factor_plan(Work(quantize, CalibrationConfig(samples=64), size))
    assert sum(sent) in {n * triangle_numbers(K) for n in (min(1, len(plan.senders)), len(plan.senders))}
    assert [rank for rank, numbers in enumerate(sent) if numbers][:1] == list(plan.senders[:1])


def test_one_process_tries_no_more_than_it_asks_for() -> None:
    tried: list[float] = []

    def step(damp: float) -> None:
        tried.append(damp)

    factors = StageFactors(Alone(), torch.eye(K), CONFIG)
    assert next(iter(factors.tried(step, [0.1, 0.4]))) is None
    assert tried == [0.1]
    assert factors.for_solve() is None


def test_a_ladder_that_has_to_begin_higher_is_the_same_for_all() -> None:
    """No step with the first λ: H has a direction that is below zero by more than that."""
    moments, weight = moments_of()
    hessian = moments.hessian()
    hessian -= 0.6 * torch.linalg.eigvalsh(hessian).min() * torch.eye(K)
    hessian[0, 0] = -0.1 * hessian.diagonal().mean()
    hessian[0, 1:] = hessian[1:, 0] = 0
    step = weight @ (0.1 * torch.eye(K))
    words = (step @ hessian, hessian, step @ hessian, hessian.abs(), 0.06)
    alone = choose_step(*words)
    assert alone.damp_percent not in damp_ladder(0.06)
    for size in (2, 5, 8):
        found, _ = by_ranks(size, lambda team: choose_step(*words, StageFactors(team, hessian, CONFIG)))
        assert found == [alone] * size


def test_a_hessian_that_no_damping_helps_is_told_as_such() -> None:
    worse = -torch.eye(K)

    def work(team: Thread) -> bool:
        factors = StageFactors(team, worse, CONFIG)
        assert choose_step(worse, worse, worse, worse, 0.05, factors) == StepChoice()
        factor = factors.for_solve()
        alone = factorize(worse, column_order(worse, CONFIG), CONFIG.damp_percent)
        return factor is not None and factor.RT is None and factor.attempts == alone.attempts

    found, sent = by_ranks(5, work)
    assert found == [True] * 5
    assert sent == [0] * 5
