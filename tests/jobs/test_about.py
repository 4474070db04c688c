"""`gptq rules`, `targets`, `recipes` and `doctor`: complete, true to the registry, and readable."""

from __future__ import annotations

import json
from importlib import metadata
from typing import get_args

import pytest
import torch

from gptq_cli.cli.app import main
from gptq_cli.config import QuantizeConfig
from gptq_cli.jobs import about, doctor
from gptq_cli.preflight.registry import RULES
from gptq_cli.readers import Target
from gptq_cli.recipes import RECIPES
from gptq_cli.results.about import Check


def _json(capsys: pytest.CaptureFixture[str], command: str) -> dict[str, object]:
    assert main([command, "--json"]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


def test_every_rule_is_listed_with_its_explanation() -> None:
    assert [rule.id for rule in about.rules().rules] == list(RULES)
    assert all(rule.summary and rule.explanation and rule.levels for rule in about.rules().rules)


def test_every_target_has_rules_and_no_rule_of_another() -> None:
    listed = {target.name: target.rules for target in about.targets().targets}
    assert list(listed) == list(get_args(Target))
    for name, rules in listed.items():
        assert rules, name
        assert all(name in rule.topics for rule in rules)


def test_a_recipe_shows_what_it_changes() -> None:
    for recipe in about.recipes(["w8"]).recipes:
        assert QuantizeConfig(**dict(recipe.settings)) == QuantizeConfig.of(recipe.name)  # type: ignore[arg-type]
    assert [recipe.name for recipe in about.recipes([]).recipes] == list(RECIPES)


@pytest.mark.parametrize("command", ["rules", "targets", "recipes", "doctor"])
def test_as_a_table_and_as_one_document(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert _json(capsys, command)
    assert main([command]) == 0
    table = capsys.readouterr().out
    expected = {
        "rules": "disk-offload",
        "targets": "sglang",
        "recipes": "w4g128",
        "doctor": metadata.version("torch"),
    }
    assert expected[command] in table


def _check(name: str, environ: dict[str, str]) -> Check:
    return next(check for check in doctor.doctor(environ).checks if check.name == name)


def test_idle_cores_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_cli.devices.host_threads.usable_cores", lambda: torch.get_num_threads() + 1)
    check = _check("threads", {"OMP_NUM_THREADS": "1"})
    assert check.verdict == "warning"
    assert "OMP_NUM_THREADS is 1" in check.advice


def test_slow_arithmetic_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_cli.gptq.matmul.fast_matmul_supported", lambda dtype, kind: False)
    assert "widens it to float32" in _check("bfloat16 on cpu", {}).advice


def test_a_missing_package_is_an_error_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert not doctor.doctor({}).ok
    assert main(["doctor"]) == 1
    assert "pip install no-such-package" in capsys.readouterr().out


def test_a_missing_optional_package_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "does something"})
    check = _check("no-such-package", {})
    assert (check.verdict, check.advice) == ("note", "optional: it does something")
