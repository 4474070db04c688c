"""What comes from outside: no display, table or page lets a character through that a terminal acts upon."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gptq_cli import display
from gptq_cli.display.escapes import console_for, escaped, fit_encoding, json_line, many_lines, one_line
from gptq_cli.display.load import load_summary, verify_summary
from gptq_cli.display.maps import FREE, GLYPHS, OVER, map_summary
from gptq_cli.display.plain import lines
from gptq_cli.display.rich import RichDisplay
from gptq_cli.display.tables import findings_table, run_summary
from gptq_cli.report.page import report_html
from tests.display.events import OFFLOAD, load_report, report, sample_run, verify_report
from tests.display.map_reports import fits, planned, refused

EVIL = "\x1b]0;PWN\x07\x1b[31m\r\n\x00\x7f\x9b2J\x85\u2028\u2029\u202e\u2066\ud800[red]:smile:[/red]"
TERMINAL_ACTS_ON = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def hostile(value: Any) -> Any:
    """`value` with `EVIL` in every text that is not one of a few words that displays decide by."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, tuple):
        return tuple(hostile(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        words = (
            "phase",
            "level",
            "where",
            "outcome",
            "verdict",
            "method",
            "kind",
            "device",
            "rule",
            "inventory",
        )
        names = [field.name for field in fields(value) if field.init and field.name not in words]
        return replace(value, **{name: hostile(getattr(value, name)) for name in names})
    return value


@pytest.mark.parametrize(
    "code", [0, 7, 8, 10, 13, 27, 127, 0x80, 0x9B, 0x2028, 0x202E, 0x2069, 0xD800, 0xDFFF]
)
def test_every_control_is_spelled(code: int) -> None:
    shown = one_line(f"a{chr(code)}b")
    assert shown.isascii()
    assert shown.isprintable()
    assert shown.startswith("a\\")
    assert shown.encode().decode("unicode_escape") == f"a{chr(code)}b"


def test_the_rest_stays() -> None:
    for text in ("café 語 😀 👩‍👩‍👧 שלום\u200f", "C:\\dir\\new", "[red]x[/red]", "~ ¡ÿ"):
        assert one_line(text) == many_lines(text) == text
    assert many_lines("a\tb\nc\r\x1b[2J") == "a\tb\nc\\r\\x1b[2J"


def test_what_is_well_is_the_same_object() -> None:
    for value in (report(), OFFLOAD, load_report(), *(event for _, event in sample_run(1))):
        assert escaped(value) is value
    assert escaped({"a\n": ["b\n", 1]}) == {"a\\n": ["b\\n", 1]}


def test_json_is_printable_ascii() -> None:
    line = json_line({"a": EVIL})
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == {"a": EVIL}


def test_plain_lines_are_single_lines() -> None:
    for _, event in sample_run(2):
        for line in lines(escaped(hostile(event))):
            assert "\n" not in line
            assert not TERMINAL_ACTS_ON.search(line), line


def drawn(*renderables: Any) -> str:
    stream = io.StringIO()
    console = console_for(stream)
    for renderable in renderables:
        console.print(renderable)
    return stream.getvalue()


TABLES = pytest.mark.parametrize(
    ("value", "table"),
    [
        (report(), run_summary),
        (load_report(), load_summary),
        (fits(), map_summary),
        (planned(), map_summary),
        (refused(), map_summary),
        (OFFLOAD, lambda finding: findings_table([finding])),
        (verify_report(sound=False), verify_summary),
    ],
    ids=["run", "load", "fits", "planned", "refused", "finding", "verify"],
)


@TABLES
@pytest.mark.parametrize("columns", ["0", "00", "1", "5", "39", "-1", "wide", "²", "9" * 20, "9" * 5000])
def test_no_width_loses_a_word_of_a_table(
    value: Any, table: Any, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(columns: str) -> Counter[str]:
        """Characters, but those of the lines and bars that are drawn as wide as there is room."""
        monkeypatch.setenv("COLUMNS", columns)
        stream = io.StringIO()
        console_for(stream).print(table(value))
        return Counter(re.sub(r"[\s\u2500-\u259f·!%+\\]", "", stream.getvalue()))

    assert not words("300") - words(columns)


@pytest.mark.parametrize(
    ("columns", "lines", "size"), [("0", "0", (80, 25)), ("7", "9", (7, 9)), ("120", "", (120, 25))]
)
def test_a_size_of_zero_says_nothing(
    columns: str, lines: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", lines)
    assert tuple(console_for(io.StringIO(), least_width=1).size) == size


@TABLES
def test_tables_show_text_as_text(value: Any, table: Any) -> None:
    out = drawn(table(escaped(hostile(value))))
    assert not TERMINAL_ACTS_ON.search(out)
    flat = re.sub(r"\s|│|├|─", "", out)
    assert "\\x1b]0;PWN" in flat
    assert "[red]:smile:[/red]" in flat


def test_a_verification_shows_text_as_text() -> None:
    verification = hostile(verify_report(sound=False))
    assert not TERMINAL_ACTS_ON.search(drawn(verify_summary(escaped(verification))))


def test_the_live_display_sends_its_own_sequences_alone() -> None:
    stream = io.StringIO()
    with RichDisplay(console_for(stream)) as display:
        for _, event in sample_run(2):
            display(escaped(hostile(event)))
        display.log(f"a library prints {EVIL}")
    assert not TERMINAL_ACTS_ON.search(stream.getvalue())
    assert "\\x1b]0;PWN" in stream.getvalue()


def test_a_page_shows_text_as_text() -> None:
    page = report_html(hostile(report()))
    assert not TERMINAL_ACTS_ON.search(page)
    assert "\\u202e" in page
    page.encode("utf-8")


def _shown(text: str, encoding: str) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    fit_encoding(stream)
    stream.write(text)
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_a_terminal_without_our_characters_keeps_the_parts_of_a_bar_apart() -> None:
    bar = "".join(glyph for glyph, _ in GLYPHS) + FREE + OVER
    shown = _shown(bar, "ascii")
    assert "?" not in shown
    assert len(set(shown)) == len(shown) == len(bar)
    assert _shown(bar, "utf-8") == bar
    assert _shown("·é█\u6a21", "latin-1") == "·é#?"


def test_every_character_that_displays_draw_with_has_one_of_ascii() -> None:
    folder = Path(display.__file__).parent
    drawn = {
        letter for path in folder.glob("*.py") for letter in path.read_text("utf-8") if not letter.isascii()
    }
    assert len(drawn) > 10
    assert [letter for letter in sorted(drawn) if "?" in _shown(letter, "ascii")] == []
