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
        "fast": {"sweeps": 0, "refit": False, "solve_for": "own"},
        "balanced": {},
        "best": {"sweeps": 4, "dense_share": 1.0, "fisher_tokens": 32_768},
        "max": {"sweeps": 4, "dense_share": 1.0, "fisher_tokens": 32_768, "tune_epochs": 2},
    }
)
"""Fields in which a recipe differs from `config.QuantizeConfig()`; format and bits are the same."""
RECIPE_FIELDS = frozenset(name for overrides in RECIPES.values() for name in overrides)
"""Fields whose default depends on the recipe."""
