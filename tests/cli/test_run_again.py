"""`--config report.json`: what of an earlier run counts where other bits are asked for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from gptq_cli.module_settings import AskedBefore, parse_module_rules
from tests.cli.conftest import FakeJobs, Run
from tests.cli.test_preset import a_report

CHOSEN = ["model.layers.0=bits:8", "lm_head=bits:8", "b=dense"]
GIVEN = ["b=dense"]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """That of a run with a budget of bits and one setting by module."""
    whole = json.loads(a_report(bits=4, quantize_head=True, module=CHOSEN))
    whole["head"] = {"name": "lm_head"}
    whole["bit_choice"] = {"asked": 4.5, "given_modules": GIVEN, "quantize_head": False}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(whole))
    return path


@pytest.mark.parametrize(
    ("words", "bits", "modules", "head"),
    [
        ((), (4, None), CHOSEN, True),
        (("--bits-per-weight", "5"), (4, 5.0), GIVEN, False),
        (("--bits", "8"), (8, None), GIVEN, False),
        (("--bits", "8", "--module", "c=dense", "--quantize-head"), (8, None), ["c=dense"], True),
        (("--group-size", "32"), (4, None), CHOSEN, True),
        (("--no-quantize-head",), (4, None), [CHOSEN[0], CHOSEN[2]], False),
        (("--no-quantize-head", "--module", "lm_head=bits:8"), (4, None), ["lm_head=bits:8"], False),
    ],
)
def test_what_a_budget_chose_holds_until_other_bits_are_asked_for(
    words: tuple[str, ...],
    bits: tuple[int, float | None],
    modules: list[str],
    head: bool,
    jobs: FakeJobs,
    run: Run,
    report: Path,
) -> None:
    outcome = run("quantize", "--config", str(report), *words)
    assert (outcome.code, outcome.err) == (0, "")
    found = jobs.job.quantize
    assert (found.bits, found.bits_per_weight) == bits
    assert (found.modules, found.quantize_head) == (parse_module_rules(modules), head)


@pytest.mark.parametrize(
    ("words", "modules", "head"),
    [
        ((), GIVEN, False),
        (("--group-size", "32", "--quantize-head"), GIVEN, True),
        (("--bits-per-weight", "5"), None, False),
        (("--module", "c=dense"), None, False),
    ],
)
def test_a_run_again_keeps_what_was_given_at_first(
    words: tuple[str, ...], modules: list[str] | None, head: bool, jobs: FakeJobs, run: Run, report: Path
) -> None:
    assert run("quantize", "--config", str(report), *words).code == 0
    kept = jobs.job.asked_before
    assert kept == (None if modules is None else AskedBefore(modules=tuple(modules), quantize_head=head))
    if kept is not None:
        whole = json.loads(report.read_text()) | {"bit_choice": None, "asked_before": asdict(kept)}
        report.write_text(json.dumps(whole))
        assert run("quantize", "--config", str(report)).code == 0
        assert (jobs.job.asked_before, jobs.job.quantize.modules) == (kept, parse_module_rules(CHOSEN))
        assert run("quantize", "--config", str(report), "--bits-per-weight", "5").code == 0
        assert jobs.job.asked_before is None
        assert jobs.job.quantize.modules == parse_module_rules(GIVEN)
        assert jobs.job.quantize.quantize_head == head


def test_what_was_given_for_a_head_that_is_not_quantized_is_left_out(
    jobs: FakeJobs, run: Run, report: Path
) -> None:
    whole = json.loads(report.read_text())
    whole["bit_choice"] |= {"given_modules": [*GIVEN, "lm_head=bits:8"], "quantize_head": True}
    report.write_text(json.dumps(whole))
    assert run("quantize", "--config", str(report), "--no-quantize-head").code == 0
    assert jobs.job.asked_before == AskedBefore(modules=tuple(GIVEN), quantize_head=False)


def test_the_environment_asks_for_other_bits_too(
    jobs: FakeJobs, run: Run, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQ_BITS_PER_WEIGHT", "6")
    assert run("quantize", "--config", str(report)).code == 0
    assert jobs.job.quantize.bits_per_weight == 6
    assert jobs.job.quantize.modules == parse_module_rules(GIVEN)


@pytest.mark.parametrize(
    "damaged",
    [
        {"bit_choice": {"asked": 4}},
        {"bit_choice": [1]},
        {"bit_choice": None, "asked_before": {}},
        {"head": {}},
    ],
)
def test_a_damaged_report_is_an_error(
    damaged: dict[str, object], jobs: FakeJobs, run: Run, report: Path
) -> None:
    report.write_text(json.dumps(json.loads(report.read_text()) | damaged))
    outcome = run("quantize", "--config", str(report))
    assert outcome.code == 2
    assert "is not the whole report of a gptq quantize run" in outcome.err
