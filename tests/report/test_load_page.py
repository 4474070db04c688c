"""The page of `gptq load`: what runs where, what was measured, what the files are like."""

from dataclasses import replace

from gptq_cli.report.load_page import load_html
from gptq_cli.results.load import Gate
from tests.display.events import load_report, verify_report
from tests.report.pages import check_page, measured_load
from tests.report.test_page import text_of


def test_it_is_well_formed_and_the_same_every_time() -> None:
    for made in (load_report(), measured_load(), verify_report(sound=True), verify_report(sound=False)):
        check_page(load_html(made))
        assert load_html(made) == load_html(made)


def test_a_failure_is_said_first() -> None:
    read = text_of(load_html(measured_load()))
    assert read.index("kl is 0.0213, above --max-kl 0.02") < read.index("Where it runs")
    assert "failed" in read.partition("Measured")[0]
    assert "failed" not in text_of(load_html(load_report()))


def test_generated_text_keeps_its_lines_and_is_no_markup() -> None:
    page = load_html(replace(load_report(), text="one\n<b>two\u202e"))
    assert "<pre>one\n&lt;b&gt;two\\u202e</pre>" in page


def test_rules_of_files_and_readers_have_their_outcome() -> None:
    read = text_of(load_html(verify_report(sound=False)))
    assert "scales error scales are finite" in read
    assert "four-bits-only error" in read
    assert "3-bit codes; allowed: 4" in read
    assert "vllm takes it" in read
    assert "exllamav2 refuses" in read


def test_a_warning_that_is_a_finding_stands_once() -> None:
    made = replace(measured_load(), warnings=("another warning",))
    read = text_of(load_html(made))
    assert read.count("another warning") == 1
    assert "min_score" not in read
    gated = replace(made, gates=(Gate("min_score", 0.5, 0.4213, "arc_easy"),))
    assert "--min-score arc_easy=0.5 0.4213 FAILED" in text_of(load_html(gated))
