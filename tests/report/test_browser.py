"""Every page in a real browser: it fits, it can be read on both papers, and its plots say what they show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.report.comparison_page import comparison_html
from gptq_cli.report.load_page import load_html
from gptq_cli.report.page import report_html
from gptq_cli.results.comparison import Comparison
from tests.report.browser import NAMES, PROGRAM, Browser, chromium
from tests.report.pages import expert_report, measured_load
from tests.report.test_comparison_page import BARE, run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH")

PAGES = {
    "run": lambda: report_html(expert_report(experts=64, layers=30)),
    "load": lambda: load_html(measured_load()),
    "comparison": lambda: comparison_html(
        Comparison(runs=(*(run(f"a/long/path/of/run-{n}", kl=n / 100) for n in range(1, 8)), BARE))
    ),
}
OVERFLOWING = """
[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && box.right > document.documentElement.clientWidth + 1 && !e.closest('.scroll');
}).map(e => e.outerHTML.slice(0, 80))
"""
CONTRAST = """
(() => {
  const light = text => {
    const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(x => {
      const part = x / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const paper = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const words = [...document.querySelectorAll('body *')].filter(
    e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && !e.closest('svg'));
  const all = selector => [...document.querySelectorAll(selector)];
  const low = (list, colour, least) => list.filter(
    e => ratio(light(colour(getComputedStyle(e))), light(paper(e))) < least
  ).map(e => e.outerHTML.slice(0, 80));
  const drawn = s => s.fill === 'none' || s.fill === 'rgba(0, 0, 0, 0)' ? s.stroke : s.fill;
  return [
    ...low(words, s => s.color, 4.5),
    ...low(all('svg text'), s => s.fill, 4.5),
    ...low(all('svg g[class], svg polyline.line, svg polyline.dashes'), drawn, 3),
  ];
})()
"""
SHOWN = "[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, made in PAGES.items():
        (folder / f"{name}.html").write_text(made(), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 1200])
@pytest.mark.parametrize("name", PAGES)
def test_it_fits_and_can_be_read(
    name: str, width: int, dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[name], width=width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OVERFLOWING) == []
    assert browser.value(CONTRAST) == []
    assert browser.value("document.scripts.length") == 0
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 384) is dark


@pytest.mark.parametrize(("width", "shown", "hidden"), [(400, "narrow", "wide"), (1200, "wide", "narrow")])
def test_each_plot_is_shown_once_and_has_a_text_alternative(
    width: int, shown: str, hidden: str, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["run"], width=width, dark=False)
    kinds: Any = browser.value(f"{SHOWN}.map(e => e.getAttribute('class'))")
    assert kinds.count(shown) == 4
    assert hidden not in kinds
    named = "e.getAttribute('aria-label') || e.querySelector('title').textContent"
    described = "e.getAttribute('aria-label') || e.querySelector('desc').textContent"
    for words in (named, described):
        assert all(browser.value(f"{SHOWN}.map(e => {words})"))
    assert browser.value(f"{SHOWN}.every(e => e.getAttribute('role') === 'img')")


def test_letters_of_plots_are_as_large_as_those_of_tables(browser: Browser, pages: dict[str, Path]) -> None:
    for width in (400, 1200):
        browser.open(pages["run"], width=width, dark=False)
        scale = browser.value(f"{SHOWN}.filter(e => e.querySelector('text')).map(e => e.getCTM().a)")
        assert min(scale) >= 0.9, "letters of 12 pixels become too small"


def test_the_checks_above_can_fail(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    head = '<meta name="viewport" content="width=device-width"><body style="background:#fff">'
    page.write_text(f'{head}<p style="width:900px;color:#eee">pale and wide</p>')
    browser.open(page, width=400, dark=False)
    assert len(browser.value(OVERFLOWING)) == 1
    assert len(browser.value(CONTRAST)) == 1
