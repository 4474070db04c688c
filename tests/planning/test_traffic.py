"""Bytes that leave a rank: counted by hand. Against what travels: tests/e2e/test_ranks.py."""

from dataclasses import replace

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.gptq.hessian import Hessian
from gptq_cli.gptq.triangle import triangle_numbers
from gptq_cli.model.facts import ModelFacts
from gptq_cli.planning.cases import Work
from gptq_cli.planning.traffic import Traffic, block_traffic
from gptq_cli.ranks.leaves import dealt
from tests.planning.schedules import schedule
from tests.preflight.shapes import llama, mixture

FACTS = llama(blocks=2, hidden=1024, inner=4096)
OWN = Work(QuantizeConfig(group_size=128, solve_for="own"), CalibrationConfig(samples=32, seq_len=64), 2)
DENSE = replace(OWN, quantize=QuantizeConfig(group_size=128, solve_for="dense", dense_share=1.0))


def sent(work: Work, facts: ModelFacts = FACTS) -> tuple[Traffic, ...]:
    found = block_traffic(facts, work, schedule(facts, work, parked=True))
    assert found["model.layers.0"] == found["model.layers.1"]
    return found["model.layers.0"]


@pytest.mark.parametrize("columns", [1, 7, 8, 64, 96, 1000])
def test_a_triangle_is_what_a_hessian_hands_over(columns: int) -> None:
    with Hessian(columns) as hessian:
        assert triangle_numbers(columns) == hessian.stored_values


def test_two_ranks_send_half_of_their_sums_and_half_of_the_whole() -> None:
    triangles = 3 * triangle_numbers(1024) + triangle_numbers(4096)
    first, second = sent(OWN)
    assert first.sum_bytes == second.sum_bytes == 4 * 2 * triangles / 2
    rows = {1024: (3 * 1024, 1024, 2 * 4096), 4096: (1024,)}
    codes = sum(n * k + 3 * n * k // 128 for k, each in rows.items() for n in each) // 2
    assert codes < first.code_bytes < 1.02 * codes  # the rest: g_idx and the account of each linear


def test_moments_travel_from_the_ranks_that_have_them() -> None:
    """Held-out pairs are the last ones, and a residual makes a cross moment as wide as it."""
    first, second = sent(DENSE)
    assert first.sum_bytes < second.sum_bytes
    fit = 3 * triangle_numbers(1024) + triangle_numbers(4096) + 3 * 1024**2 + 1024 * 4096
    assert (first.sum_bytes, second.sum_bytes) == (4 * (fit + fit / 2), 4 * (fit + fit))


@pytest.mark.parametrize(("ranks", "senders"), [(2, ()), (4, ()), (5, (4,)), (6, (4, 5)), (8, (4, 5))])
def test_a_factor_that_is_made_ahead_is_sent_by_the_rank_that_makes_it(
    ranks: int, senders: tuple[int, ...]
) -> None:
    found = sent(replace(DENSE, ranks=ranks))
    one = 4 * (3 * triangle_numbers(1024) + triangle_numbers(4096))
    assert [traffic.factor_bytes for traffic in found] == [one if n in senders else 0 for n in range(ranks)]
    assert {traffic.factor_bytes for traffic in sent(replace(OWN, ranks=ranks))} == {0}


def test_sums_of_experts_go_to_the_rank_that_solves_them() -> None:
    """Of 3 experts and 2 ranks one has 2; the sum of all goes to both."""
    facts = mixture(experts=3, hidden=1024, inner=512)
    first, second = sent(OWN, facts)
    attention = 2 * triangle_numbers(1024)
    widths = [triangle_numbers(columns) for columns in (1024, 512)]
    owners = dealt([1.0] * 3, 2)
    for rank, found in enumerate((first, second)):
        others = sum(owner != rank for owner in owners)
        assert found.sum_bytes == 4 * (attention + sum(others * one + one for one in widths))


def test_one_rank_sends_nothing() -> None:
    assert sent(replace(DENSE, ranks=1)) == (Traffic(),)
