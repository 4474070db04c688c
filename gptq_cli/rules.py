"""What a rule is: a function from facts to remarks, with the id, levels and explanation that it is known by.

    @rule("error")
    def no_linears(case: JobCase) -> Iterator[Remark]:
        "No linear can be quantized, so the result would be a copy of the model."
        if not case.facts.linears:
            yield Remark(subject=case.facts.model, message="…", hint="…")

The name of the function is the id (`no-linears`), and its docstring is what `--explain no-linears` prints.
`rules_in` finds the rules of a module. Called with a case, a rule answers with findings that carry its id.
Preflight, the targets and the verification of checkpoints all use this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

from gptq_cli.findings import Finding, Level

Case = TypeVar("Case", contravariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """What a rule says about one subject: a `Finding` without the name of the rule."""

    subject: str
    message: str
    hint: str = ""
    modules: tuple[str, ...] = ()
    size_bytes: int = 0
    level: Level | None = None
    """One of the rule's levels; None: the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(Generic[Case]):
    """A rule as its readers see it. Made by `rule`."""

    id: str
    """Stable, kebab-case: `disk-offload`. `--explain` knows it, and findings carry it."""
    levels: tuple[Level, ...]
    """Levels of its findings, the usual one first."""
    topics: tuple[str, ...]
    """What it belongs to, in the words of those who ask it: a target rule names the targets, a rule of
    `gptq load --verify` the part of the checkpoint, a preflight rule the config fields that it is about."""
    explanation: str
    """What it means and why it exists."""
    check: Callable[[Case], Iterable[Remark]]

    def __call__(self, case: Case) -> list[Finding]:
        """The findings about `case`."""
        return [self.finding(remark) for remark in self.check(case)]

    def __str__(self) -> str:
        return self.id

    def finding(self, remark: Remark) -> Finding:
        """`remark` under this rule's id. Raises `ValueError` for a level that the rule does not declare."""
        level = remark.level or self.levels[0]
        if level not in self.levels:
            raise ValueError(f"{self.id} has no level {level!r}; declared: {', '.join(self.levels)}")
        return Finding(
            rule=self.id,
            level=level,
            subject=remark.subject,
            message=remark.message,
            hint=remark.hint,
            modules=remark.modules,
            size_bytes=remark.size_bytes,
        )

    @property
    def summary(self) -> str:
        """The first paragraph of the explanation, on one line."""
        return " ".join(self.explanation.partition("\n\n")[0].split())


def rule(
    *levels: Level, topics: tuple[str, ...] = ()
) -> Callable[[Callable[[Case], Iterable[Remark]]], Rule[Case]]:
    """Make a rule of a function; `levels` are those of its findings, the usual one first."""

    def made(check: Callable[[Case], Iterable[Remark]]) -> Rule[Case]:
        return Rule(
            id=rule_id(check),
            levels=levels,
            topics=topics,
            explanation=explanation_of(check),
            check=check,
        )

    return made


def rule_id(function: Callable[..., Any]) -> str:
    """`disk_offload` -> `disk-offload`."""
    return function.__name__.replace("_", "-")


def explanation_of(function: Callable[..., Any]) -> str:
    """The docstring, without its indentation."""
    return inspect.cleandoc(function.__doc__ or "")


def rules_in(module: ModuleType) -> tuple[Rule[Any], ...]:
    """The rules that are defined in `module`, in their order there."""
    found = (value for value in vars(module).values() if isinstance(value, Rule))
    return tuple(one for one in found if one.check.__module__ == module.__name__)
