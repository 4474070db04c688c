"""Factorisations that wait for each other, and the ranks that make one for all."""

from __future__ import annotations

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.planning.cases import Work
from gptq_cli.planning.factors import FactorPlan, factor_plan


@pytest.mark.parametrize(
    ("ranks", "plan"),
    [
        (0, FactorPlan(5)),  # three to choose λ, the step, the solve
        (1, FactorPlan(5)),
        (2, FactorPlan(4)),
        (3, FactorPlan(3)),
        (4, FactorPlan(3)),
        (5, FactorPlan(2, (4,))),
        (6, FactorPlan(1, (4, 5))),
        (64, FactorPlan(1, (4, 5))),
    ],
)
def test_ranks_that_are_left_over_work_ahead(ranks: int, plan: FactorPlan) -> None:
    assert factor_plan(Work(QuantizeConfig(), CalibrationConfig(), ranks)) == plan


def test_a_ladder_of_two_takes_two_ranks() -> None:
    quantize = QuantizeConfig(damp_percent=0.9)
    found = [factor_plan(Work(quantize, CalibrationConfig(), ranks)) for ranks in (1, 2, 3, 4)]
    assert found == [FactorPlan(4), FactorPlan(3), FactorPlan(2, (2,)), FactorPlan(1, (2, 3))]


@pytest.mark.parametrize("work", [Work(QuantizeConfig(solve_for="own"), CalibrationConfig(), 8),
                                  Work(QuantizeConfig(), CalibrationConfig(samples=3), 8)])  # fmt: skip
def test_without_held_out_pairs_there_is_one(work: Work) -> None:
    assert factor_plan(work) == FactorPlan()
