"""Will that target take the checkpoint? Its rules, asked of the facts of a checkpoint, made or planned.

The rules need shapes and settings only, no tensor: `quantize --target` asks them before it starts, and
`load --target` asks them of a finished checkpoint.
"""

from __future__ import annotations

from gptq_cli.fields import check_choice
from gptq_cli.findings import Finding
from gptq_cli.readers import Target
from gptq_cli.results.load import RuleResult, TargetReport
from gptq_cli.rules import rules_in
from gptq_cli.targets.facts import TARGETS, Case, TargetFacts
from gptq_cli.targets.rules import MODULES


def target_report(target: Target, facts: TargetFacts) -> TargetReport:
    """Every rule of `target` and what it says. Raises `ConfigError` for an unknown name."""
    check_choice("target", target, TARGETS)
    case = Case(target, facts)
    asked = (rule for module in MODULES for rule in rules_in(module) if target in rule.topics)
    results = (RuleResult(rule.id, rule.summary, tuple(rule(case))) for rule in asked)
    return TargetReport(target=target, rules=tuple(results))


def check_target(target: Target, facts: TargetFacts) -> tuple[Finding, ...]:
    """All findings about `target`, in the order of its rules. Raises `ConfigError` for an unknown name."""
    return target_report(target, facts).findings
