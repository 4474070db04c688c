"""The page that compares checkpoints, and the table at a terminal, which has the same rows."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from gptq_cli.display.comparison import comparison_table, figure_rows, letter, setting_rows
from gptq_cli.report.comparison_page import comparison_html
from gptq_cli.results.comparison import Compared, Comparison
from tests.report.pages import check_page, scores
from tests.report.test_page import text_of


def run(path: str, **changes: Any) -> Compared:
    held: dict[str, Any] = {
        "path": path,
        "origin": "report.json",
        "model": "m",
        "settings": (("bits", 4), ("sym", True), ("modules", None)),
        "size_bytes": 2**20,
        "size_before_bytes": 2**21,
        "kl": 0.02,
        "measured_on": "text (8 x 64)",
        "loss": 0.01,
        "block_losses": (("model.layers.0", 0.01), ("model.layers.1", None)),
        "peak_bytes": (("cpu", 2**30),),
        "tasks": scores(),
    }
    return Compared(**(held | changes))


BARE = Compared(path="other", origin="config", settings=(("bits", 3),), size_bytes=2**19)


def drawn(comparison: Comparison, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, highlight=False).print(comparison_table(comparison))
    return stream.getvalue()


def test_only_settings_that_differ_are_shown_and_those_that_are_unknown_are_no_difference() -> None:
    both = Comparison(runs=(run("a"), run("b", settings=(("bits", 8), ("sym", True), ("modules", "x")))))
    assert both.differing == ("bits", "modules")
    assert [row.texts for row in setting_rows(both)] == [("4", "8"), ("default", "x")]
    assert Comparison(runs=(run("a"), BARE)).differing == ("bits",)
    assert [row.label for row in setting_rows(Comparison(runs=(BARE,)))] == ["bits"]


def test_true_and_one_are_two_values() -> None:
    two = Comparison(runs=(run("a", settings=(("sym", True),)), run("b", settings=(("sym", 1),))))
    assert two.differing == ("sym",)


def test_a_figure_that_is_no_number_is_not_the_best() -> None:
    for runs in ((run("a", kl=math.nan), run("b"), run("c", kl=0.03)), (run("a", kl=math.nan), run("b"))):
        (row,) = [x for x in figure_rows(Comparison(runs=runs)) if x.label == "KL"]
        assert row.best == frozenset({1} if len(runs) == 3 else ())


def test_the_best_figure_is_marked_where_there_is_one() -> None:
    rows = {x.label: x for x in figure_rows(Comparison(runs=(run("a"), run("b", kl=0.01), BARE)))}
    assert rows["KL"].texts == ("0.0200", "0.0100", "-")
    assert rows["KL"].best == {1}
    assert rows["mean loss"].best == frozenset()
    assert rows["size"].best == {2}
    assert rows["arc_easy acc_norm"].texts == ("0.4213", "0.4213", "-")
    assert "perplexity" not in rows


def test_what_does_not_compare_is_said() -> None:
    found = Comparison(runs=(run("a"), run("b", model="n", measured_on="else"), BARE)).cautions
    assert any("models differ: m, n" in text for text in found)
    assert any("different texts: else, text (8 x 64)" in text for text in found)
    assert any("without report.json" in text for text in found)
    assert Comparison(runs=(run("a"), run("b"))).cautions == ()


@pytest.mark.parametrize("width", [30, 40, 80, 160])
def test_the_table_fits_every_terminal_and_loses_nothing(width: int) -> None:
    runs = tuple(run(f"run-{number}", kl=0.001 * (number + 1)) for number in range(9))
    lines = drawn(Comparison(runs=runs), width).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for number in range(9):
        assert f" {letter(number)}  run-{number}: m, report.json" in text
    figures = [word for line in lines if line.startswith(" KL") for word in line.split()[1:]]
    assert len(figures) == 9


def test_letters_do_not_end() -> None:
    assert (letter(0), letter(25), letter(26)) == ("A", "Z", "A2")


def test_the_page_is_well_formed_and_plots_runs_with_the_same_blocks() -> None:
    both = Comparison(runs=(run("a"), run("b", loss=0.02), BARE))
    page = comparison_html(both)
    tags = check_page(page)
    assert tags.seen.count("svg") == 2
    assert 'class="best"' in page
    assert "A a: m, report.json" in text_of(page)
    assert "C other: its config alone" in text_of(page)
    others = Comparison(runs=(run("a"), run("b", block_losses=(("x", 1.0),))))
    assert "<svg" not in comparison_html(others)
    check_page(comparison_html(Comparison(runs=(BARE,))))


def test_paths_are_text() -> None:
    assert "<b>" not in comparison_html(Comparison(runs=(replace(BARE, path="<b>\u202e"),)))
