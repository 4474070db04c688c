"""`comparison_html(comparison)`: several checkpoints side by side, as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gptq_cli import __version__
from gptq_cli.display import format as fmt
from gptq_cli.display.comparison import Row, figure_rows, letter, origin_text, setting_rows
from gptq_cli.display.escapes import escaped
from gptq_cli.report import html
from gptq_cli.report.html import Cell, Markup, Section, Tile
from gptq_cli.report.plots import number
from gptq_cli.report.style import COLOURS
from gptq_cli.report.svg import POINTS, Plot, Series
from gptq_cli.results.comparison import Comparison

MOST_LINES = len(COLOURS)
"""Checkpoints in the plot: lines of more cannot be told apart."""


def comparison_html(comparison: Comparison) -> str:
    """The complete page. The same reports give the same bytes."""
    comparison = escaped(comparison)
    runs = comparison.runs
    models = list(dict.fromkeys(run.model for run in runs if run.model is not None))
    title = " and ".join(models) or runs[0].path
    lede = "One checkpoint" if len(runs) == 1 else f"{len(runs)} checkpoints side by side"
    made_by = f"Made by gptq-cli {__version__}."
    return html.page(title, lede, list(_tiles(comparison)), _sections(comparison), made_by)


def _tiles(comparison: Comparison) -> Iterator[Tile]:
    """The best of each figure that decides, where it differs."""
    wanted = ("KL", "perplexity", "mean loss", "size", "time")
    for row in figure_rows(comparison):
        if row.label in wanted and row.best:
            names = ", ".join(letter(place) for place in sorted(row.best))
            yield Tile(f"best {row.label}", row.texts[min(row.best)], names)


def _sections(comparison: Comparison) -> Iterator[Section]:
    runs = comparison.runs
    named = [(letter(place), origin_text(run)) for place, run in enumerate(runs)]
    yield Section(
        "Checkpoints",
        [
            html.facts(named),
            *([html.warnings(comparison.cautions)] if comparison.cautions else []),
        ],
    )
    heads = ("", *(letter(place) for place in range(len(runs))))
    yield Section("Figures", [_table(heads, figure_rows(comparison), "Figures", bars=True)])
    settings = setting_rows(comparison)
    title = "Settings" if len(runs) == 1 else "Settings that differ"
    yield Section(title, [_table(heads, settings, title, bars=False)] if settings else ())
    yield Section("Loss", list(_losses(comparison)))


def _table(heads: Sequence[str], rows: Sequence[Row], about: str, *, bars: bool) -> Markup:
    """The best figure of each row is marked; bars compare the figures of a row."""
    held = []
    for row in rows:
        known = [value for value in row.values if value is not None]
        most = max(known, default=0.0)
        compare = bars and bool(row.best) and most > 0 and min(known) >= 0
        cells = [row.label] + [
            Cell(
                text,
                "best" if place in row.best else "",
                value / most if compare and (value := row.values[place]) is not None else None,
            )
            for place, text in enumerate(row.texts)
        ]
        held.append(cells)
    return html.table(heads, held, about)


def _losses(comparison: Comparison) -> Iterator[Markup]:
    """A line for each run over its blocks, where they have the same blocks."""
    shown = [(place, run) for place, run in enumerate(comparison.runs) if run.block_losses][:MOST_LINES]
    if len(shown) < 2 or len({tuple(name for name, _ in run.block_losses) for _, run in shown}) > 1:
        return
    series = [
        Series(
            name=letter(place),
            values=tuple(value for _, value in run.block_losses),
            labels=tuple(
                f"{letter(place)}, {name}: {fmt.loss(value)}" if value is not None else name
                for name, value in run.block_losses
            ),
            mark=POINTS[index % len(POINTS)],
            style=COLOURS[index],
            joined=True,
        )
        for index, (place, run) in enumerate(shown)
    ]
    blocks = [name for name, _ in shown[0][1].block_losses]
    plot = Plot(
        title="Mean loss of each block",
        description=f"{len(shown)} checkpoints: the share of the output's energy that is lost in each block.",
        series=series,
        x_names=[name.rpartition(".")[2] for name in blocks],
        unit=number,
    )
    yield html.figure(plot, plot.description)
