"""What was proved, as text: complete, readable without colour, no line wider than the page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.display.load import load_summary, rate_text, verify_summary
from gptq_cli.results.load import Rate
from tests.display.events import full_load_report, load_report, verify_report
from tests.display.test_tables import rendered
from tests.golden import check_golden
from tests.report.pages import measured_load


def test_the_summary_of_a_load() -> None:
    check_golden("tables/load_80.txt", rendered(load_summary(load_report())))


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_of_a_load_that_proved_everything(width: int) -> None:
    check_golden(f"tables/load_full_{width}.txt", rendered(load_summary(full_load_report()), width))


@pytest.mark.parametrize("sound", [True, False])
def test_the_files_rule_by_rule(sound: bool) -> None:
    name = "sound" if sound else "unsound"
    check_golden(f"tables/verify_{name}_80.txt", rendered(verify_summary(verify_report(sound=sound))))


def test_targets_alone_claim_nothing_about_the_values() -> None:
    report = verify_report(sound=True)
    text = rendered(verify_summary(replace(report, checks=report.checks[:1])))
    assert " is readable: 903 tensors" in text
    assert "sound" not in text


def test_a_load_that_proved_nothing_claims_nothing() -> None:
    text = rendered(load_summary(replace(load_report(), perplexity=None, new_tokens=0)))
    for word in ("perplexity", "generated", "KL", "gates", "tokens per second", "sound"):
        assert word not in text


def test_a_warning_is_shown_once() -> None:
    shown = rendered(load_summary(replace(full_load_report(), warnings=("the page is missing",))))
    assert shown.count("the page is missing") == 1


def test_a_bench_without_a_dense_model_has_one_column() -> None:
    full = full_load_report()
    assert full.bench is not None
    alone = replace(full.bench, dense_speed=None, dense_weight_bytes=0)
    text = rendered(load_summary(replace(full, bench=alone)))
    assert "ratio" not in text
    assert "812.3 ± 16.2" in text


def test_a_rate_has_its_spread() -> None:
    assert rate_text(Rate(812.34, 12.04)) == "812.3 ± 12.0"


def test_a_path_is_never_cut() -> None:
    path = "/very/long/" + "x" * 150
    assert path in rendered(load_summary(replace(load_report(), path=path))).replace("\n", "")


@pytest.mark.parametrize("width", [30, 40, 60, 80, 160])
def test_scores_of_tasks_are_whole_at_every_width(width: int) -> None:
    text = rendered(load_summary(measured_load()), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for figure in ("arc_easy", "acc_norm", "0.4213", "0.0101", "0.4312", "0.0099", "2,376", "a_group"):
        assert figure in words
