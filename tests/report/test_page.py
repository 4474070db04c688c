"""The page of a run: self-contained, complete, safe."""

import re
from dataclasses import replace
from html import unescape

import pytest

from gptq_cli.report.page import report_html
from gptq_cli.results.kept import OwnSettings
from tests.display.events import DENSE, OFFLOAD, report
from tests.report.pages import check_page, expert_report, full_report


def text_of(page: str) -> str:
    """What is read of it, without tags and without the list of contents."""
    page = re.sub(r"<style>.*?</style>|<nav.*?</nav>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page.replace("<wbr>", ""))).split())


def test_it_is_well_formed_with_each_plot_wide_and_narrow() -> None:
    for made in (report(), full_report(), expert_report(), report(1), report(40)):
        tags = check_page(report_html(made))
        assert tags.seen.count("figure") == 4
        assert tags.seen.count("svg") == 2 * 4 + (2 if made.experts is not None else 0)


def test_every_linear_stands_in_the_table_and_the_fallback_is_a_word() -> None:
    page = report_html(report()).replace("<wbr>", "")
    for linear in report().linears:
        assert f'<th scope="row" class="name">{linear.name}</th>' in page
    assert page.count("FALLBACK rtn</span>") == 2  # in the table of all, and among the worst
    assert "of 21 linears" in page


def test_many_experts_have_one_row_together(monkeypatch: pytest.MonkeyPatch) -> None:
    made = expert_report()
    assert "model.layers.0.mlp.experts.5.gate_proj" in text_of(report_html(made))
    monkeypatch.setattr("gptq_cli.report.page.MOST_ROWS", 10)
    folded = text_of(report_html(made)).partition("those of experts together")[2]
    assert "model.layers.0.mlp.experts.*.gate_proj 8" in folded
    assert "experts.5.gate_proj" not in folded


def test_predicted_stands_beside_measured() -> None:
    page = report_html(full_report())
    assert "peak on cuda:0 1.75 GiB 1.80 GiB -3 %" in text_of(page)
    assert "time 31.4 s 40.0 s" in text_of(page)
    assert "cuda:0 predicted" in page
    assert "estimated 18.0 s" in page
    assert "estimate" not in report_html(report())


def test_bits_are_counted_over_both_what_is_quantized_and_everything() -> None:
    page = report_html(report())
    assert "<dt>bits per parameter</dt><dd>6.792, all of the checkpoint</dd>" in page
    assert "<dt>bits per quantized weight</dt><dd>4.281</dd>" in page


def test_loss_is_explained_and_the_worst_linears_come_first() -> None:
    read = text_of(report_html(report()))
    assert "share of its output's energy that is lost" in read
    worst = max(report().linears, key=lambda linear: linear.loss)
    table = read.partition("Worst linears ")[2]
    assert table.startswith(f"linear method loss round-to-nearest change {worst.name} FALLBACK rtn")


def test_findings_stand_once_and_warnings_that_are_none_beside_them() -> None:
    said = f"{OFFLOAD.subject}: {OFFLOAD.message}"
    made = replace(full_report(), warnings=(said, "the disk is slow"))
    read = text_of(report_html(made))
    assert read.count(OFFLOAD.message) == 1 + read.count(said)
    assert "warning cpu-offload model.layers.28-29" in read
    assert f"note left-dense lm_head {DENSE.message}" in read
    assert "the disk is slow" in read
    assert "Findings" not in text_of(report_html(replace(report(), warnings=())))


def test_the_same_report_gives_the_same_bytes() -> None:
    assert report_html(full_report()) == report_html(full_report())


def test_names_are_text_and_never_markup() -> None:
    page = report_html(replace(report(), model="<script>alert(1)</script>", warnings=("a <b> & c",)))
    assert "<script" not in page
    assert "a &lt;b&gt; &amp; c" in page


def test_a_report_without_blocks_has_no_plots() -> None:
    page = report_html(replace(report(), blocks=(), warnings=()))
    assert "<svg" not in page
    assert "Findings" not in page
    check_page(page)


def test_losses_that_are_not_finite_do_not_break_the_page() -> None:
    block = report().blocks[0]
    broken = tuple(replace(linear, loss=float("nan"), rtn_loss=0.0) for linear in block.linears)
    page = report_html(replace(report(), blocks=(replace(block, linears=broken),)))
    assert "nothing to show" in page


def test_each_layer_of_experts_has_its_tokens() -> None:
    page = report_html(expert_report())
    read = text_of(page)
    assert "model.layers.0 8 0 4,003 4,007 2 1" in read
    assert "never reached: 0" in read
    assert page.count('<svg class="strip"') == 2
    assert 'aria-label="Tokens of each of 8 experts of model.layers.1: 0 to 4,007 tokens' in page
    assert "Experts" not in text_of(report_html(full_report()))


def test_bits_of_every_linear_and_the_head() -> None:
    head = replace(report().linears[0], name="lm_head", bits=8, group_size=-1)
    own = OwnSettings(name="lm_head", bits=8, group_size=-1, sym=True, linears=1)
    page = report_html(replace(report(), head=head, own_settings=(own,)))
    assert '<th scope="row" class="name">lm_head</th>' in page
    assert page.count('<td class="n">8</td><td class="n">-1</td>') == 1
    assert page.count('<td class="n">4</td><td class="n">64</td>') == 21
    assert "<dt>by module</dt><dd>lm_head: 8 bits, one group per row</dd>" in page


def test_what_was_measured_is_shown_with_its_gates_and_tasks() -> None:
    read = text_of(report_html(full_report()))
    assert "KL to the dense model 0.0213 above --max-kl 0.02" in read
    assert "--max-kl 0.02 0.0213 FAILED" in read
    assert "--max-perplexity 30 23.46 passed" in read
    assert "arc_easy acc_norm 0.4213 ± 0.0101 0.4312 0.0099 0 2,376" in read
    assert "KL(dense, quantized) 0.0213 nats per token" in read
