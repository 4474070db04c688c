"""A `MapReport` as text: the placement as a folded tree, one bar per device, findings, the verdict.

     model                                 14.0 GiB  cuda:0, cuda:1
     ├─ embed_tokens                       1.00 GiB  cuda:0
     ├─ layers                             13.0 GiB  cuda:0, cuda:1
     │  ├─ 0-15                            6.50 GiB  cuda:0

     cuda:0  ██████████████▓▒▒░░░░······  needs 10.2 of 24.0 GiB, 13.8 GiB to spare
             █ weights 7.50  ▓ working memory 0.81  ▒ Hessians 0.77  ░ activations 1.00

Each part of a bar has a glyph of its own, so that no colour is needed. It fits into 80 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from gptq_cli.display import format as fmt
from gptq_cli.display.bits import widths_text
from gptq_cli.display.processes import gain_rows, memory_rows, phases_table
from gptq_cli.display.tables import (
    bit_choice_rows,
    facts_table,
    findings_table,
    listed,
    other_settings,
    own_settings_rows,
    quantized_text,
    warnings_rows,
)
from gptq_cli.results.kept import KeptDense
from gptq_cli.results.map import DevicePlan, MapReport, QuantizePlan, TreeRow
from gptq_cli.wording import number_of

GLYPHS = (
    ("█", "cyan"),
    ("≡", "cyan"),
    ("▓", "blue"),
    ("▒", "magenta"),
    ("░", "yellow"),
    ("%", "green"),
    ("+", "default"),
)
"""Glyph and colour of each of `DevicePlan.parts`, from the left of a bar to its right."""
FREE, OVER = "·", "!"
VERDICT_STYLES = {"fits": "bold green", "fits with warnings": "bold yellow", "refused": "bold red"}


def map_summary(report: MapReport) -> Group:
    """The complete report, the verdict last."""
    title = Text(f" {report.model}", style="bold", overflow="fold")
    parts: list[RenderableType] = [title, "", facts_table(_rows(report))]
    if report.tree:
        parts += ["", tree_table(report.tree)]
    if report.devices:
        parts += ["", DeviceBars(report.devices)]
    if report.ranks:
        parts += ["", facts_table(memory_rows(report))]
    if report.offload or report.offload_skipped:
        parts += ["", facts_table(_offload_rows(report))]
    if report.plan is not None:
        parts += ["", *_plan(report.plan, report.kept_dense)]
    elif report.kept_dense:
        parts += ["", facts_table(own_settings_rows((), report.kept_dense))]
    if report.findings:
        parts += ["", findings_table(report.findings)]
    verdict = Text(" verdict: ", style="bold").append(report.verdict, style=VERDICT_STYLES[report.verdict])
    return Group(*parts, "", verdict)


def _rows(report: MapReport) -> list[tuple[str, RenderableType]]:
    limits = f", max memory {report.max_memory}" if report.max_memory else ""
    budgets = ", ".join(
        f"{budget.device} {fmt.size(budget.free_bytes)} free of {fmt.size(budget.total_bytes)}"
        for budget in report.budgets
    )
    work = f"{number_of(report.parameters, 'parameter')}, {number_of(report.blocks, 'block')}"
    given = " (given, not detected)" if report.inventory == "given" else ""
    rows: list[tuple[str, RenderableType]] = [
        ("model", f"{report.architecture}, {work}, {fmt.size(report.weights_bytes)} as {report.dtype}"),
        ("device map", f"{report.spec}{limits}"),
        ("devices", f"{budgets or 'none'}{given}"),
    ]
    if report.reason:
        rows.append(("plan", report.reason))
    rows += listed("streaming", report.streaming)
    if report.time is not None:
        writing = report.plan.writing_seconds if report.plan else None
        writes = f"; {fmt.duration(writing)} of them to write the calibration text" if writing else ""
        measuring = report.plan.measuring_seconds if report.plan else None
        writes += f"; {fmt.duration(measuring)} of them to measure what fewer bits cost" if measuring else ""
        seconds = report.plan.seconds if report.plan and report.plan.seconds else report.time.seconds
        rows.append(("time", f"about {fmt.duration(seconds)} ({report.time.source}){writes}"))
    elif report.inventory == "given" and report.ok:
        rows.append(("time", "not estimated: no card is named, as in cuda:0=24GiB@4090"))
    return rows + warnings_rows(report.warnings, report.findings)


def _offload_rows(report: MapReport) -> list[tuple[str, RenderableType]]:
    rows: list[tuple[str, RenderableType]] = []
    if report.offload:
        rows.append(("offload", f"{' -> '.join(report.offload)} (hooks, in this order)"))
    if report.offload_skipped:
        rows.append(("no hook", f"{', '.join(report.offload_skipped)} (no parameters)"))
    return rows


def tree_table(rows: Sequence[TreeRow]) -> Table:
    """The folded tree with sizes and devices."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row, guide in zip(rows, guides([row.depth for row in rows]), strict=True):
        name = Text(f" {guide}", style="dim").append(row.name or "(model)", style="default not dim")
        if row.modules > 1:
            name.append(f"  ({row.modules} alike)", style="dim")
        where = ", ".join(row.devices)
        if not row.parameters:
            where = f"{where} (no parameters)"
        table.add_row(name, fmt.size(row.size_bytes), Text(where, style="" if row.leaf else "dim"))
    return table


def guides(depths: Sequence[int]) -> list[str]:
    """The lines of a tree before each name: `│  ├─ `. Names at the smallest depth have none."""
    top = min(depths, default=0)
    drawn = []
    for at, depth in enumerate(depths):
        guide = ""
        for level in range(top + 1, depth + 1):
            later = next((d for d in depths[at + 1 :] if d <= level), None)
            more = later == level
            if level == depth:
                guide += "├─ " if more else "└─ "
            else:
                guide += "│  " if more else "   "
        drawn.append(guide)
    return drawn


class DeviceBars:
    """A renderable: the memory needed on each device, as a bar and in numbers; all bars are equally long."""

    def __init__(self, plans: Sequence[DevicePlan]) -> None:
        self._plans = plans

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = max(7, *(len(plan.device) for plan in self._plans))
        figures = [_figures(plan) for plan in self._plans]
        cells = max(8, min(60, options.max_width - names - 4 - max(map(len, figures))))
        for plan, text in zip(self._plans, figures, strict=True):
            bar = Text(f" {plan.device:<{names}} ", style="bold", overflow="fold")
            for glyphs, style in bar_segments(plan, cells):
                bar.append(glyphs, style=f"{style} not bold")
            yield bar.append(f"  {text}", style="not bold" if plan.fits else "bold red")
            held = zip(GLYPHS, plan.parts, strict=True)
            texts = [
                f"{glyph} {word} {fmt.size(size_bytes)}"
                for (glyph, _), (word, size_bytes) in held
                if size_bytes
            ]
            legend = Table.grid()
            legend.add_column(width=names + 2)
            legend.add_column()
            legend.add_row("", Text(_joined(texts, options.max_width - names - 2), style="dim"))
            yield legend


def _figures(plan: DevicePlan) -> str:
    needs = f"needs {fmt.gib(plan.needed_bytes)} of {fmt.gib(plan.limit_bytes)} GiB"
    if plan.fits:
        return f"{needs}, {fmt.size(plan.spare_bytes)} to spare"
    return f"{needs}, DOES NOT FIT, {fmt.size(-plan.spare_bytes)} too much"


def _joined(texts: Sequence[str], width: int) -> str:
    """Entries two blanks apart, in lines of at most `width` characters; no entry is broken."""
    lines = [""]
    for text in texts:
        if lines[-1] and len(lines[-1]) + 2 + len(text) > width:
            lines.append(text)
        else:
            lines[-1] += f"  {text}" if lines[-1] else text
    return "\n".join(lines)


def bar_segments(plan: DevicePlan, cells: int) -> list[tuple[str, str]]:
    """Glyphs and colours of a bar of exactly `cells` characters; beyond the limit every glyph is `!`."""
    total = max(plan.limit_bytes, plan.needed_bytes, 1)
    limit_at = round(cells * plan.limit_bytes / total)
    segments, end, drawn = [], 0, 0
    for (glyph, style), (_, size_bytes) in zip(GLYPHS, plan.parts, strict=True):
        end += size_bytes
        stop = min(cells, round(cells * end / total))
        inside = max(0, min(stop, limit_at) - drawn)
        over = max(0, stop - max(drawn, limit_at))
        segments += [(glyph * inside, style), (OVER * over, "red")]
        drawn = max(drawn, stop)
    segments.append((FREE * (cells - drawn), "dim"))
    return [(glyphs, style) for glyphs, style in segments if glyphs]


def _disk(plan: QuantizePlan) -> str:
    """`1.2 GiB while the run works: the checkpoint, and …`."""
    parts = ["the checkpoint"]
    if plan.gradient_bytes:
        parts.append(f"{fmt.size(plan.gradient_bytes)} of gradients")
    if plan.snapshot_bytes:
        parts.append(f"{fmt.size(2 * plan.snapshot_bytes)} so that an interrupted run goes on quickly")
    needed = plan.size_after_bytes + plan.gradient_bytes + 2 * plan.snapshot_bytes
    *most, last = parts
    listed = f": {', '.join(most)}, and {last}" if most else ""
    return f"{fmt.size(needed)} while the run works{listed}"


def _plan(plan: QuantizePlan, kept: Sequence[KeptDense]) -> list[RenderableType]:
    """The facts of a dry run about the work."""
    bits = widths_text(plan.bits, plan.bit_choice, plan.own_settings, plan.linears)
    group = fmt.group(plan.group_size)
    reason = f" ({plan.group_reason})" if plan.group_reason else ""
    work = f"{number_of(plan.blocks, 'block')}, {number_of(plan.linears, 'linear')}"
    smaller = plan.size_before_bytes / plan.size_after_bytes if plan.size_after_bytes else 0.0
    sizes = f"{fmt.size(plan.size_before_bytes)} -> {fmt.size(plan.size_after_bytes)}"
    rows: list[tuple[str, RenderableType]] = [
        ("work", f"{work}, {plan.samples} x {plan.seq_len} tokens"),
        ("recipe", f"{bits}, {group}{reason}"),
        *bit_choice_rows(plan.bit_choice),
        *own_settings_rows(other_settings(plan), kept),
        ("quantized", quantized_text(plan)),
        ("size", f"{sizes} ({smaller:.2f} times smaller), {plan.bits_per_parameter:.3f} bits per parameter"),
    ]
    rows.append(("disk", _disk(plan)))
    if plan.ranks is not None:
        rows += gain_rows(plan.ranks)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_row(" blocks", "linears, stage by stage", "out x in", style="bold")
    for stage in plan.stages:
        for index, (name, in_features, out_features) in enumerate(stage.linears):
            blocks = f" {stage.blocks} x" if index == 0 else ""
            table.add_row(blocks, Text(name), f"{out_features} x {in_features}")
    if plan.head is not None:
        name, in_features, out_features = plan.head
        table.add_row(" head", Text(name), f"{out_features} x {in_features}")
    parts: list[RenderableType] = [facts_table(rows)]
    phases = phases_table(plan.ranks) if plan.ranks is not None else None
    if phases is not None:
        parts += ["", phases]
    return [*parts, "", table] if plan.stages else parts
