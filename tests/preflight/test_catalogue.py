"""Every rule has an id, an explanation, a row in the documentation, and is run."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import gptq_cli.preflight as room
from gptq_cli.errors import ConfigError
from gptq_cli.preflight.catalogue import RULES, explain

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/preflight-rules.md").read_text(encoding="utf-8")
ROWS = {
    found[1]: set(found[2].split(", "))
    for found in re.finditer(r"^\| `([a-z0-9-]+)` \| ([a-z, ]+) \| .+ \|$", DOCS, re.MULTILINE)
}


def said(source: str) -> dict[str, set[str]]:
    """Rule ids that findings are made with, and the levels that stand beside them, from the source code."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            rule = named["rule"]
            if isinstance(rule, ast.Constant):
                levels = {c.value for c in ast.walk(named["level"]) if isinstance(c, ast.Constant)}
                found.setdefault(str(rule.value), set()).update(str(level) for level in levels)
    return found


SOURCES = "\n".join(p.read_text(encoding="utf-8") for p in sorted(Path(room.__path__[0]).glob("rules_*.py")))


def test_the_documentation_has_every_rule_and_no_other() -> None:
    assert sorted(ROWS) == sorted(RULES)


def test_the_documentation_has_the_levels_of_the_code() -> None:
    for rule, levels in said(SOURCES.replace("from __future__ import annotations", "")).items():
        assert ROWS[rule] == levels, rule


def test_findings_only_name_rules_that_can_be_explained() -> None:
    made = set(said(SOURCES.replace("from __future__ import annotations", "")))
    for path in (ROOT / "gptq_cli/jobs").glob("*.py"):
        made |= set(said(path.read_text(encoding="utf-8")))
    assert made <= set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_explain(rule: str) -> None:
    text = explain(rule)
    assert len(text) > 30
    assert text == inspect.getdoc(RULES[rule])


def test_explain_an_unknown_rule() -> None:
    with pytest.raises(ConfigError, match="no rule") as caught:
        explain("disk-ofload")
    assert caught.value.hint == "did you mean disk-offload or cpu-offload?"
    with pytest.raises(ConfigError):
        explain("")
