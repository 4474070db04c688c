"""A rule: its id is the function's name, its explanation the docstring, and its findings carry both."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from gptq_cli.findings import Finding
from gptq_cli.preflight.rules.quantization import no_linears  # another module's: not one of this
from gptq_cli.rules import Remark, Rule, rule, rules_in


@rule("warning", "note", topics=("weather",))
def too_cold(case: int) -> Iterator[Remark]:
    """It is too cold
    to go out.

    Below zero, water freezes.
    """
    if case < 0:
        yield Remark(subject="water", message=f"{case} degrees", hint="stay in", modules=("a",), size_bytes=3)
    elif case < 10:
        yield Remark(subject="air", message="cool", level="note")


@rule("error")
def above_boiling(case: int) -> list[Remark]:
    """Water boils."""
    return [Remark(subject="water", message="steam", level="note")] if case > 100 else []


def test_a_rule_knows_itself() -> None:
    assert (too_cold.id, str(too_cold), too_cold.levels) == ("too-cold", "too-cold", ("warning", "note"))
    assert too_cold.topics == ("weather",)
    assert too_cold.explanation == "It is too cold\nto go out.\n\nBelow zero, water freezes."
    assert too_cold.summary == "It is too cold to go out."


def test_findings_carry_the_id_and_the_usual_level() -> None:
    assert too_cold(20) == []
    assert too_cold(-5) == [
        Finding(
            rule="too-cold",
            level="warning",
            subject="water",
            message="-5 degrees",
            hint="stay in",
            modules=("a",),
            size_bytes=3,
        )
    ]
    assert too_cold(5) == [Finding(rule="too-cold", level="note", subject="air", message="cool")]


def test_a_level_that_is_not_declared_is_a_defect() -> None:
    with pytest.raises(ValueError, match="above-boiling has no level 'note'; declared: error"):
        above_boiling(101)


def test_the_rules_of_a_module_are_its_own_in_their_order() -> None:
    assert isinstance(no_linears, Rule)
    assert rules_in(sys.modules[__name__]) == (too_cold, above_boiling)
