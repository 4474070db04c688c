"""What a preflight rule says: findings, and the report that collects all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]

_ORDER: dict[Level, int] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One statement of one rule about one subject."""

    rule: str
    """Stable id of the rule, kebab-case: `disk-offload`, `group-divides`."""
    level: Level
    subject: str
    """What the statement is about: a module, a file, a flag."""
    message: str
    """What is wrong: the value found and the values allowed. Lower case, one sentence."""
    hint: str = ""
    """What to do next. What opens with `--` or `gptq ` can be pasted: the options replace those of the same
    name; a remark follows in parentheses, a choice after `; or `. Tests follow every such hint."""
    modules: tuple[str, ...] = ()
    """The modules concerned, in model order."""
    size_bytes: int = 0
    """The bytes concerned, 0 where bytes mean nothing."""

    @property
    def lines(self) -> tuple[str, ...]:
        """As text: the statement, and the hint below it."""
        about = f" {self.subject}:" if self.subject else ""
        first = f"{self.level} [{self.rule}]{about} {self.message}"
        return (first, f"  hint: {self.hint}") if self.hint else (first,)


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """All findings at once, errors first, in a stable order."""

    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """True when no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)

    def ordered(self) -> tuple[Finding, ...]:
        """Findings by level; within a level the order in which the rules ran."""
        return tuple(sorted(self.findings, key=lambda finding: _ORDER[finding.level]))

    @property
    def lines(self) -> tuple[str, ...]:
        """Every finding as text, in that order."""
        return tuple(line for finding in self.ordered() for line in finding.lines)

    def __add__(self, other: PreflightReport) -> PreflightReport:
        return PreflightReport(self.findings + other.findings)
