"""The parts of a page: tiles, facts, tables, findings, figures. What comes in is text and is escaped here.

`Markup` is what these functions return; it is put into a page as it is. No script, font or image comes from
elsewhere, so a page can be mailed and is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NewType

from gptq_cli.findings import Finding
from gptq_cli.report.style import page_style
from gptq_cli.report.svg import Plot, responsive

BAR_REM = 5.0
"""Length of the longest bar in a table: the same in every column, so that bars compare."""
Markup = NewType("Markup", str)
Tone = Literal["", "good", "warn", "bad", "best"]


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure that is read first: what it is, the figure, what to compare it with."""

    label: str
    figure: str
    beside: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table with more than its text."""

    text: str
    tone: Tone = ""
    share: float | None = None
    """Of the longest bar in its column, drawn below the text; None: no bar."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page, in its list of contents by its title."""

    title: str
    parts: Sequence[Markup]

    @property
    def slug(self) -> str:
        """What a link calls it."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def page(title: str, lede: str, figures: Sequence[Tile], sections: Iterable[Section], made_by: str) -> str:
    """The whole document; sections without parts are left out."""
    shown = [section for section in sections if section.parts]
    links = "".join(f'<a href="#{one.slug}">{escape(one.title)}</a>' for one in shown)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lede">{escape(lede)}</p>',
        *([f'<nav aria-label="Contents">{links}</nav>'] if len(shown) > 2 else []),
        *([tiles(figures)] if figures else []),
    ]
    for one in shown:
        heading = f'<h2 id="{one.slug}">{escape(one.title)}</h2>'
        body.append("\n".join((f'<section aria-labelledby="{one.slug}">', heading, *one.parts, "</section>")))
    inner = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{page_style()}</style>\n</head>\n<body>\n<main>\n{inner}\n"
        f"<footer>{escape(made_by)}</footer>\n</main>\n</body>\n</html>\n"
    )


def tiles(shown: Iterable[Tile]) -> Markup:
    """The figures that are read first."""
    parts = []
    for tile in shown:
        tone = f' class="{tile.tone}"' if tile.tone else ""
        beside = f"<span>{escape(tile.beside)}</span>" if tile.beside else ""
        label = f"<span>{escape(tile.label)}</span>"
        parts.append(f'<div class="tile">{label}<b{tone}>{escape(tile.figure)}</b>{beside}</div>')
    return Markup(f'<div class="tiles">{"".join(parts)}</div>')


def facts(rows: Iterable[tuple[str, str]]) -> Markup:
    """Labels and values; a label that is repeated is written once."""
    parts, last = [], None
    for label, value in rows:
        term = f"<dt>{escape(label)}</dt>" if label != last else "<dt></dt>"
        parts.append(f"{term}<dd>{escape(value)}</dd>")
        last = label
    return Markup(f"<dl>{''.join(parts)}</dl>") if parts else Markup("")


def table(heads: Sequence[str], rows: Iterable[Sequence[str | Cell]], about: str, words: int = 1) -> Markup:
    """A table that scrolls on its own where it is too wide. The first `words` columns hold text, the others
    numbers."""
    scope = "".join(
        f'<th scope="col"{_column(number, words)}>{escape(head)}</th>' for number, head in enumerate(heads)
    )
    body = []
    for row in rows:
        cells = []
        for number, cell in enumerate(row):
            held = cell if isinstance(cell, Cell) else Cell(cell)
            tag, own = ("th", ' scope="row"') if number == 0 else ("td", "")
            inner = _held(held)
            if number == 0:
                inner = inner.replace(".", ".<wbr>")  # where a dotted name may be broken
            cells.append(f"<{tag}{own}{_column(number, words)}>{inner}</{tag}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    inner = f"<table><thead><tr>{scope}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table>"
    label = f'tabindex="0" role="region" aria-label="{escape(about)}"'  # a key must be able to scroll it
    return Markup(f'<div class="scroll" {label}>{inner}</div>')


def _column(number: int, words: int) -> str:
    return (' class="name"' if number == 0 else "") if number < words else ' class="n"'


def _held(cell: Cell) -> str:
    text = escape(cell.text)
    inner = f'<span class="{cell.tone}">{text}</span>' if cell.tone else text
    if cell.share is None:
        return inner
    return (
        f'{inner}<span class="meter" style="width:{BAR_REM * min(1.0, max(0.0, cell.share)):.2f}rem"></span>'
    )


def findings(found: Iterable[Finding]) -> Markup:
    """Each finding with its rule, what it is about, and what to do."""
    tones: dict[str, Tone] = {"error": "bad", "warning": "warn", "note": ""}
    items = []
    for one in found:
        tone = f' class="{tones[one.level]}"' if tones[one.level] else ""
        head = f"<strong{tone}>{one.level}</strong> <code>{escape(one.rule)}</code> {escape(one.subject)}"
        hint = f'<p class="soft">{escape(one.hint)}</p>' if one.hint else ""
        items.append(f'<li class="{one.level}">{head}<p>{escape(one.message)}</p>{hint}</li>')
    return Markup(f'<ul class="findings">{"".join(items)}</ul>') if items else Markup("")


def warnings(texts: Iterable[str]) -> Markup:
    """Warnings that are no findings."""
    items = "".join(f'<li class="warning">{escape(text)}</li>' for text in texts)
    return Markup(f'<ul class="findings">{items}</ul>') if items else Markup("")


def figure(plot: Plot, explained: str) -> Markup:
    """A plot under its title, with a sentence about how to read it."""
    caption = f"<figcaption>{escape(explained)}</figcaption>" if explained else ""
    return Markup(f"<h3>{escape(plot.title)}</h3>\n<figure>{caption}{responsive(plot)}</figure>")


def heading(text: str) -> Markup:
    """Of a part of a section."""
    return Markup(f"<h3>{escape(text)}</h3>")


def paragraph(text: str, *, soft: bool = False) -> Markup:
    """Words; `soft`: those below a figure."""
    opened = '<p class="soft">' if soft else "<p>"
    return Markup(f"{opened}{escape(text)}</p>")


def preformatted(text: str) -> Markup:
    """A command, or generated text: its line breaks are kept."""
    return Markup(f"<pre>{escape(text)}</pre>")


def folded(summary: str, inner: Markup) -> Markup:
    """What is shown when it is asked for."""
    return Markup(f"<details><summary>{escape(summary)}</summary>{inner}</details>")
