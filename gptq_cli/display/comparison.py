"""Checkpoints side by side: `comparison_table` for a terminal; its rows, as text, are those of the page too.

A checkpoint has a letter, so that columns stay narrow; where not all fit beside each other, the table goes on
below with the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from string import ascii_uppercase

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from gptq_cli.display import format as fmt
from gptq_cli.display.tables import facts_table, listed
from gptq_cli.results.comparison import Compared, Comparison

NOT_KNOWN = "-"
_COLUMN = 10
"""The least width of a column, with the space before it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of every checkpoint, as text; `best`: the places of the best ones, where one is better."""

    label: str
    texts: tuple[str, ...]
    values: tuple[float | None, ...] = ()
    best: frozenset[int] = frozenset()


def letter(place: int) -> str:
    """`A`, `B`, … `Z`, `A2`, …"""
    turn, number = divmod(place, len(ascii_uppercase))
    return ascii_uppercase[number] + (str(turn + 1) if turn else "")


def setting_rows(comparison: Comparison) -> list[Row]:
    """The settings that differ; of a single checkpoint all that are known."""
    names = comparison.differing
    if len(comparison.runs) == 1:
        names = tuple(name for name, _ in comparison.runs[0].settings)
    return [
        Row(
            name,
            tuple(
                fmt.setting(dict(run.settings)[name]) if name in dict(run.settings) else NOT_KNOWN
                for run in comparison.runs
            ),
        )
        for name in names
    ]


def figure_rows(comparison: Comparison) -> list[Row]:
    """Everything that was measured of at least one of them."""
    runs = comparison.runs
    rows = [
        _row("size", runs, lambda run: run.size_bytes, fmt.size),
        _row("of the dense model", runs, _share, fmt.share),
        _row("bits per parameter", runs, lambda run: run.bits_per_parameter, "{:.3f}".format),
        _row("bits per weight", runs, lambda run: run.bits_per_weight, "{:.3f}".format),
        _row("KL", runs, lambda run: run.kl, fmt.loss),
        _row("same prediction", runs, lambda run: run.top1, fmt.share, highest=True),
        _row("perplexity", runs, lambda run: run.perplexity, "{:.3f}".format),
        _row("dense perplexity", runs, lambda run: run.dense_perplexity, "{:.3f}".format, highest=None),
        *_task_rows(runs),
        _row("mean loss", runs, lambda run: run.loss, fmt.loss),
        _row("round-to-nearest", runs, lambda run: run.rtn_loss, fmt.loss, highest=None),
        _row("fallbacks", runs, lambda run: run.fallbacks, "{:.0f}".format),
        _row("time", runs, lambda run: run.seconds, fmt.duration),
        *(
            _row(f"peak on {device}", runs, partial(_peak, device), fmt.size)
            for device in dict.fromkeys(device for run in runs for device, _ in run.peak_bytes)
        ),
        _row("prompt tokens/s", runs, lambda run: run.prompt_rate, "{:.1f}".format, highest=True),
        _row("decode tokens/s", runs, lambda run: run.decode_rate, "{:.1f}".format, highest=True),
        _row("warnings", runs, lambda run: run.warnings, "{:.0f}".format),
    ]
    return [row for row in rows if any(value is not None for value in row.values)]


def _share(run: Compared) -> float | None:
    return run.size_bytes / run.size_before_bytes if run.size_bytes and run.size_before_bytes else None


def _peak(device: str, run: Compared) -> int | None:
    return dict(run.peak_bytes).get(device)


def _task_rows(runs: Sequence[Compared]) -> Iterator[Row]:
    scores = [{(one.task, one.metric): one for one in run.tasks} for run in runs]
    for key in dict.fromkeys(key for held in scores for key in held):
        higher = next(held[key].higher_is_better for held in scores if key in held)
        values = tuple(held[key].value if key in held else None for held in scores)
        texts = tuple(NOT_KNOWN if value is None else fmt.score(value) for value in values)
        yield Row(" ".join(key), texts, values, _best(values, highest=higher))


def _row(
    label: str,
    runs: Sequence[Compared],
    value_of: Callable[[Compared], float | None],
    words: Callable[[float], str],
    *,
    highest: bool | None = False,
) -> Row:
    """`highest`: whether more is better; None: neither is."""
    values = tuple(map(value_of, runs))
    texts = tuple(NOT_KNOWN if value is None else words(value) for value in values)
    return Row(label, texts, values, _best(values, highest=highest))


def _best(values: Sequence[float | None], *, highest: bool | None) -> frozenset[int]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if highest is None or len(set(known)) < 2:
        return frozenset()
    best = max(known) if highest else min(known)
    return frozenset(place for place, value in enumerate(values) if value == best)


def comparison_table(comparison: Comparison) -> RenderableType:
    """The settings that differ and the figures; the best of each in bold."""
    return _SideBySide(comparison)


class _SideBySide:
    """As many columns beside each other as the terminal is wide."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        runs = self._comparison.runs
        yield Group(*(_named(place, run) for place, run in enumerate(runs)))
        settings, figures = setting_rows(self._comparison), figure_rows(self._comparison)
        labels = max((len(row.label) for row in (*settings, *figures)), default=0) + 1
        together = max(1, (options.max_width - labels) // _COLUMN)
        for first in range(0, len(runs), together):
            places = range(first, min(first + together, len(runs)))
            yield ""
            yield _table(places, settings, figures, labels)
        if self._comparison.cautions:
            yield ""
            yield facts_table(listed("note", [Text(text) for text in self._comparison.cautions]))


def _named(place: int, run: Compared) -> Text:
    return Text(f" {letter(place)}  ", style="bold", overflow="fold").append(
        origin_text(run), style="not bold"
    )


def origin_text(run: Compared) -> str:
    """`q-fast: llama, report.json`: where it lies, what was quantized, where the figures are from."""
    model = f"{run.model}, " if run.model else ""
    return f"{run.path}: {model}{'its config alone' if run.origin == 'config' else run.origin}"


def _table(places: Sequence[int], settings: Sequence[Row], figures: Sequence[Row], labels: int) -> Table:
    table = Table.grid(padding=(0, 0, 0, 2))
    table.add_column(no_wrap=True, width=labels)
    for _ in places:
        table.add_column(justify="right", overflow="fold", min_width=_COLUMN - 2)
    heads = [letter(place) for place in places]
    for title, rows in (("settings", settings), ("figures", figures)):
        if not rows:
            continue
        if table.rows:
            table.add_row("")
        table.add_row(f" {title}", *heads, style="bold")
        for row in rows:
            cells = [
                Text(row.texts[place], style="bold" if place in row.best else "not bold") for place in places
            ]
            table.add_row(f" {row.label}", *cells)
    return table
