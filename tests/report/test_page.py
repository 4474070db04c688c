"""The HTML page: self-contained, complete, safe."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

from gptq_cli.report.page import report_html
from gptq_cli.results.kept import OwnSettings
from gptq_cli.results.run import ExpertsReport
from tests.display.events import report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Tags(HTMLParser):
    """Checks that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_tags_nest_and_four_plots_are_there() -> None:
    tags = Tags()
    tags.feed(report_html(report()))
    assert tags.open == []
    assert tags.seen.count("svg") == 4
    assert tags.seen.count("h1") == 1


def test_nothing_comes_from_elsewhere() -> None:
    page = report_html(report())
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script|https?://", page)


def test_every_linear_stands_in_the_table_and_the_fallback_is_a_word() -> None:
    page = report_html(report())
    for linear in report().linears:
        assert f"<td>{linear.name}</td>" in page
    assert page.count("FALLBACK rtn</span>") == 1
    assert "1 of 21 linears (round-to-nearest)" in page


def test_predicted_stands_beside_measured() -> None:
    assert "1.75 GiB, predicted 1.80 GiB" in report_html(report())
    assert "cuda:0 predicted" in report_html(report())


def test_bits_are_counted_over_both_what_is_quantized_and_everything() -> None:
    page = report_html(report())
    assert "<dt>bits per parameter</dt><dd>6.792, all of the checkpoint</dd>" in page
    assert "<dt>bits per quantized weight</dt><dd>4.281</dd>" in page


def test_the_same_report_gives_the_same_bytes() -> None:
    assert report_html(report()) == report_html(report())


def test_names_are_text_and_never_markup() -> None:
    page = report_html(replace(report(), model="<script>alert(1)</script>", warnings=("a <b> & c",)))
    assert "<script" not in page
    assert "a &lt;b&gt; &amp; c" in page


def test_plots_are_well_formed_for_any_number_of_blocks() -> None:
    for blocks in (1, 2, 40):
        for svg in re.findall(r"<svg.*?</svg>", report_html(report(blocks)), re.DOTALL):
            ET.fromstring(svg)


def test_a_report_without_blocks_has_no_plots() -> None:
    page = report_html(replace(report(), blocks=(), warnings=()))
    assert "<svg" not in page
    assert "Warnings" not in page


def test_losses_that_are_not_finite_do_not_break_the_page() -> None:
    block = report().blocks[0]
    broken = tuple(replace(linear, loss=float("nan"), rtn_loss=0.0) for linear in block.linears)
    page = report_html(replace(report(), blocks=(replace(block, linears=broken),)))
    assert "nothing to show" in page


def test_experts_have_a_line_of_their_own() -> None:
    found = ExpertsReport(
        experts=8, least_tokens=0, median_tokens=40, most_tokens=90, few=1, unreached=("model.experts.3",)
    )
    page = report_html(replace(report(), experts=found))
    assert "<dt>experts</dt><dd>8, which saw 0 to 90 calibration tokens" in page
    assert "no token reached 1: model.experts.3</dd>" in page
    assert "<dt>experts</dt>" not in report_html(report())


def test_bits_of_every_linear_and_the_head() -> None:
    head = replace(report().linears[0], name="lm_head", bits=8, group_size=-1)
    own = OwnSettings(name="lm_head", bits=8, group_size=-1, sym=True, linears=1)
    page = report_html(replace(report(), head=head, own_settings=(own,)))
    assert "<td>lm_head</td>" in page
    assert page.count('<td class="n">8</td><td class="n">-1</td>') == 1
    assert page.count('<td class="n">4</td><td class="n">64</td>') == 21
    assert "<dt>by module</dt><dd>lm_head: 8 bits, one group per row</dd>" in page
