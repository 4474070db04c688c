"""What the tool knows about itself: rules, targets, recipes. No torch is needed for that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from gptq_cli.preflight.registry import RULES, find_rule
from gptq_cli.readers import Target
from gptq_cli.recipes import RECIPES
from gptq_cli.results.about import (
    RecipeFact,
    RecipesReport,
    RuleFact,
    RulesReport,
    TargetFact,
    TargetsReport,
)
from gptq_cli.rules import Rule


def rules() -> RulesReport:
    """Every rule, in the order of docs/rules.md."""
    return RulesReport(rules=_facts(RULES.values()))


def rule(name: str) -> RuleFact:
    """One rule. Raises `ConfigError`, with the nearest names, for an unknown one."""
    return next(iter(_facts((find_rule(name),))))


def targets() -> TargetsReport:
    """Every target with the rules that ask about it."""
    return TargetsReport(
        targets=tuple(
            TargetFact(name=name, rules=_facts(rule for rule in RULES.values() if name in rule.topics))
            for name in get_args(Target)
        )
    )


def recipes(presets: Iterable[str]) -> RecipesReport:
    """Every recipe with the settings that it changes; `presets`: names of the shipped ones."""
    return RecipesReport(
        recipes=tuple(
            RecipeFact(name=name, settings=tuple(given.items())) for name, given in RECIPES.items()
        ),
        presets=tuple(presets),
    )


def _facts(rules: Iterable[Rule[Any]]) -> tuple[RuleFact, ...]:
    return tuple(
        RuleFact(
            id=rule.id,
            levels=rule.levels,
            topics=rule.topics,
            summary=rule.summary,
            explanation=rule.explanation,
        )
        for rule in rules
    )
