"""What the tool says about itself and the machine: its rules, targets and recipes, and `gptq doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptq_cli.findings import Level

Verdict = Literal["good", "note", "warning", "error"]
"""Of a check: as it should be, worth knowing, slower or less than it could be, or something does not work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleFact:
    """A rule that findings carry the name of."""

    id: str
    levels: tuple[Level, ...]
    """Of its findings, the usual one first."""
    topics: tuple[str, ...]
    """What it is about: targets, parts of a checkpoint, or settings."""
    summary: str
    explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesReport:
    """`gptq rules`."""

    rules: tuple[RuleFact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFact:
    """A reader of GPTQ checkpoints, and the rules that say what it takes."""

    name: str
    rules: tuple[RuleFact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetsReport:
    """`gptq targets`."""

    targets: tuple[TargetFact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFact:
    """A recipe: the settings in which it differs from `QuantizeConfig()`."""

    name: str
    settings: tuple[tuple[str, str | int | float | bool | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipesReport:
    """`gptq recipes`."""

    recipes: tuple[RecipeFact, ...]
    presets: tuple[str, ...]
    """Names that `--config` knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of `gptq doctor`."""

    name: str
    found: str
    verdict: Verdict
    advice: str = ""
    """What to do about it, or what follows from it; "" where all is well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """`gptq doctor`."""

    json_properties: ClassVar[tuple[str, ...]] = ("ok",)

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True when nothing is broken; what is slow does not count."""
        return all(check.verdict != "error" for check in self.checks)
