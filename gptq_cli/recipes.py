"""The recipes: names for options of the solver that go well together, from the fastest to the most accurate.

A recipe gives defaults; every option can be set by itself. What each is worth: docs/quality.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Recipe = Literal["fast", "balanced", "best", "max"]

RECIPES: Mapping[Recipe, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": {"sweeps": 0, "refit": False, "dense_share": 0.0625},
        "balanced": {},
        "best": {"sweeps": 4, "dense_share": 1.0, "fisher_tokens": 32_768},
        "max": {"sweeps": 4, "dense_share": 1.0, "fisher_tokens": 32_768, "tune_epochs": 2},
    }
)
"""Fields in which a recipe differs from `config.QuantizeConfig()`; format and bits are the same."""
RECIPE_FIELDS = frozenset(name for overrides in RECIPES.values() for name in overrides)
"""Fields whose default depends on the recipe."""
OF_THE_DENSE_MODEL: Mapping[str, str] = MappingProxyType(
    {
        "tune_epochs": "tuning compares with the dense model",
        "fisher_tokens": "the gradients are those of the dense model",
    }
)
"""Fields that are 0 where `solve_for` is "own", and why."""


def recipe_fields(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe, those in `given` instead of its own. It asks for no `OF_THE_DENSE_MODEL` where
    `given` says that linears are solved for their own output."""
    left_out = OF_THE_DENSE_MODEL if given.get("solve_for") == "own" else ()
    return {**{name: value for name, value in RECIPES[recipe].items() if name not in left_out}, **given}
