"""The knapsack: equal to trying every choice on small cases, and within its bound on large ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_cli.planning import knapsack
from gptq_cli.planning.knapsack import Option, choose, hull

Items = Sequence[Sequence[Option]]
OPTIONS = st.builds(
    Option,
    size_bytes=st.integers(1, 40),
    loss=st.one_of(st.floats(0, 1), st.floats(0, 1e-6), st.sampled_from([0.0, 0.5, 1.0])),
)
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), min_size=1, max_size=5)


def best_of_all(items: Items, budget: int) -> float | None:
    """The least loss that fits: every choice is tried."""
    fitting = [
        sum(one.loss for one in choice)
        for choice in itertools.product(*items)
        if sum(one.size_bytes for one in choice) <= budget
    ]
    return min(fitting, default=None)


@given(items=ITEMS, part=st.floats(-0.05, 1.05))
def test_no_choice_is_better(items: Items, part: float) -> None:
    least = sum(min(one.size_bytes for one in item) for item in items)
    most = sum(max(one.size_bytes for one in item) for item in items)
    budget = round(least + part * (most - least))
    found, best = choose(items, budget), best_of_all(items, budget)
    if found is None:
        assert best is None
        return
    held = [item[place] for item, place in zip(items, found.places, strict=True)]
    assert found.size_bytes == sum(one.size_bytes for one in held) <= budget
    assert best is not None
    assert found.loss == pytest.approx(sum(one.loss for one in held))
    assert found.loss == pytest.approx(best, abs=1e-9)


def model(sets: int, seed: int = 0) -> list[list[Option]]:
    """Linears of four shapes, whose sensitivities differ by a factor of a thousand."""
    generator = random.Random(seed)
    made = []
    for number in range(sets):
        weights = (590_000, 332_000, 1_770_000, 885_000)[number % 4]
        scale = 10 ** generator.uniform(-3, 0)
        options = [Option(int(weights * (bits + 0.25) / 8), scale * 4.0**-bits) for bits in (2, 3, 4, 8)]
        made.append([*options, Option(2 * weights, 0.0)])
    return made


@pytest.mark.parametrize("bits", [2.5, 4.0, 7.0])
def test_a_model_is_spent_to_the_last_kilobytes(bits: float) -> None:
    items = model(60)
    budget = int(sum(item[0].size_bytes for item in items) / 2.25 * bits)
    found = choose(items, budget)
    assert found is not None
    assert 0 <= budget - found.size_bytes < 0.001 * budget
    uniform = max(place for place in range(5) if sum(item[place].size_bytes for item in items) <= budget)
    assert found.loss < sum(item[uniform].loss for item in items)
    assert choose(items, budget) == found  # the same again


def test_what_does_not_fit() -> None:
    items = [[Option(5, 0.0), Option(3, 1.0)], [Option(4, 0.0)]]
    assert choose(items, 6) is None
    found = choose(items, 7)
    assert found is not None
    assert found.places == (1, 0)
    assert choose([], 0) == knapsack.Chosen((), 0, 0)


def test_many_mixtures_are_cut_and_the_choice_still_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    items = model(40, seed=3)
    budget = int(sum(item[0].size_bytes for item in items) / 2.25 * 4)
    exact = choose(items, budget)
    monkeypatch.setattr(knapsack, "MAX_MIXTURES", 3)
    rough = choose(items, budget)
    assert exact is not None
    assert rough is not None
    assert rough.size_bytes <= budget
    assert exact.loss <= rough.loss < 1.02 * exact.loss


def test_the_hull_leaves_out_what_no_price_makes_best() -> None:
    options = [Option(1, 9.0), Option(2, 8.9), Option(3, 1.0), Option(4, 1.0), Option(5, 0.0), Option(1, 9.5)]
    assert hull(options) == [0, 2, 4]
