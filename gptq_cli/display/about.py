"""Tables of `gptq rules`, `targets`, `recipes` and `doctor`."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gptq_cli.display.tables import LEVEL_STYLES, Hint
from gptq_cli.results.about import DoctorReport, RecipesReport, RuleFact, RulesReport, TargetsReport


def rules_table(report: RulesReport) -> Group:
    """Id, levels and what each rule is for."""
    return Group(_rules(report.rules), Text("gptq quantize --explain RULE says more", style="cyan"))


def targets_table(report: TargetsReport) -> Group:
    """Each target with its rules."""
    parts: list[Text | Table] = []
    for target in report.targets:
        parts += [Text(target.name, style="bold"), _rules(target.rules), Text("")]
    parts.append(Text("gptq load DIR --target NAME asks them about a checkpoint", style="cyan"))
    return Group(*parts)


def recipes_table(report: RecipesReport) -> Group:
    """Each recipe with what it sets, and the presets."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for recipe in report.recipes:
        words = ", ".join(f"{name} {value}" for name, value in recipe.settings)
        table.add_row(Text(recipe.name, style="bold"), Text(words or "the defaults"))
    table.add_row(Text("presets", style="bold"), Text(", ".join(report.presets)))
    return Group(table)


def doctor_table(report: DoctorReport) -> Table:
    """One line per check; what to do below it."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in report.checks:
        style = "green" if check.verdict == "good" else LEVEL_STYLES[check.verdict]
        table.add_row(Text(check.verdict, style=style), Text(check.name), Text(check.found))
        if check.advice:
            table.add_row("", "", Hint(check.advice))
    return table


def _rules(rules: tuple[RuleFact, ...]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for rule in rules:
        level = rule.levels[0]
        table.add_row(Text(level, style=LEVEL_STYLES[level]), Text(rule.id, style="bold"), Text(rule.summary))
    return table
