"""Tables of results: the summary of a run, and lists of findings.

The same renderables are used for a terminal and a file: frames and colours carry no meaning that the text
does not, and names and paths are never cut, because this is the result.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from gptq_cli.display import format as fmt
from gptq_cli.display.bits import bits_rows, widths_text
from gptq_cli.display.picture import method_text
from gptq_cli.events import FindingRaised, warning_text
from gptq_cli.findings import Finding, Level, PreflightReport
from gptq_cli.results.bits import BitChoice
from gptq_cli.results.kept import KeptDense, OwnSettings
from gptq_cli.results.load import LoadReport
from gptq_cli.results.map import QuantizePlan
from gptq_cli.results.run import LinearReport, RunReport, slowest_rank
from gptq_cli.results.trial import TrialReport
from gptq_cli.wording import names_text, number_of

LEVEL_STYLES: dict[Level, str] = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
LISTED = 5
"""Linears in each of the two lists of a summary."""
MODULES_NAMED = 4


class Hint:
    """A hint: a command line wraps so that it can still be pasted, other text wraps between words."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._text.startswith("gptq "):
            for line in fmt.wrap_command(self._text, options.max_width):
                yield Text(line, style="cyan", overflow="fold")  # a word that is wider than the column
        else:
            yield Text(self._text, style="cyan", overflow="fold")


def findings_table(findings: Iterable[Finding]) -> Table:
    """One entry per finding: level, rule and subject; what is wrong; which modules; what to do."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in PreflightReport(tuple(findings)).ordered():
        title = Text(finding.rule, style="bold").append(f"  {finding.subject}", style="default not bold")
        table.add_row(Text(f" {finding.level}", style=LEVEL_STYLES[finding.level]), title)
        table.add_row("", Text(finding.message))
        if len(finding.modules) > 1:
            table.add_row("", Text(modules_text(finding), style="dim"))
        if finding.hint:
            table.add_row(Text(" hint", style="cyan"), Hint(finding.hint))
    return table


def modules_text(finding: Finding) -> str:
    """`832 MiB in 2 modules: model.layers.30, model.layers.31`; a long list is cut and says so."""
    listed = names_text(finding.modules, MODULES_NAMED)
    held = f"{fmt.size(finding.size_bytes)} in " if finding.size_bytes else ""
    return f"{held}{number_of(len(finding.modules), 'module')}: {listed}"


def facts_table(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    """Labels and values."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(f" {label}", Text(value) if isinstance(value, str) else value)
    return table


def own_settings_rows(
    own: Sequence[OwnSettings], kept: Sequence[KeptDense]
) -> list[tuple[str, RenderableType]]:
    """What differs by module, and which linears of the blocks stay dense and why: one line per pattern."""
    differing = [
        f"{one.name}: {one.bits} bits, {fmt.group(one.group_size)}, {symmetry(one.sym)}{_times(one.linears)}"
        for one in own
    ]
    dense = [f"{one.name}: {one.reason}{_times(one.linears)}" for one in kept]
    return [*listed("by module", differing), *listed("stays dense", dense)]


def bit_choice_rows(choice: BitChoice | None) -> list[tuple[str, RenderableType]]:
    """How a budget of bits was spent: what was reached, and one line for each kind of linears."""
    return [] if choice is None else [(label, words) for label, words in bits_rows(choice)]


def other_settings(report: RunReport | QuantizePlan) -> tuple[OwnSettings, ...]:
    """What differs by module; of a budget of bits only what it did not choose: other groups, or symmetry."""
    if report.bit_choice is None:
        return report.own_settings
    return tuple(one for one in report.own_settings if one.group_size != report.group_size)


def _times(linears: int) -> str:
    return f" ({number_of(linears, 'linear')})" if linears > 1 else ""


def symmetry(sym: bool) -> str:
    """`symmetric` or `asymmetric`."""
    return "symmetric" if sym else "asymmetric"


def yes(value: bool) -> str:
    """`yes` or `no`."""
    return "yes" if value else "no"


def recipe(report: RunReport | LoadReport) -> str:
    """`4 bits, group 64, symmetric, format gptq`."""
    group = fmt.group(report.group_size)
    order = ", desc_act" if report.desc_act else ""
    run = report if isinstance(report, RunReport) else None
    bits = (
        widths_text(run.bits, run.bit_choice, run.own_settings, len(run.linears))
        if run
        else widths_text(report.bits, None)
    )
    return f"{bits}, {group}, {symmetry(report.sym)}{order}, format {report.checkpoint_format}"


def run_summary(report: RunReport) -> Group:
    """The result of `gptq quantize`: checkpoint, sizes, quality, time, memory, and the next command."""
    title = Text(f" {report.out}", style="bold green")
    title.append(f" is ready after {fmt.duration(report.seconds)}", style="default not bold")
    parts: list[RenderableType] = [title, "", facts_table(_run_rows(report))]
    linears = report.linears
    if linears:
        worst = sorted(linears, key=lambda linear: linear.loss, reverse=True)[:LISTED]
        slowest = sorted(linears, key=lambda linear: linear.seconds, reverse=True)[:LISTED]
        parts += ["", _worst(worst), "", _slowest(slowest)]
    parts += ["", Text(f" next: gptq load {quoted(report.out)}", style="cyan")]
    return Group(*parts)


def _starts_rows(report: RunReport) -> list[tuple[str, RenderableType]]:
    """A line for each start of a run that was interrupted."""
    if len(report.starts) < 2:
        return []
    return listed(
        "starts",
        [
            f"{start.started[:16].replace('T', ' ')}, {fmt.duration(start.seconds)}, "
            f"{number_of(start.blocks, 'block')} from {start.first_block}"
            for start in report.starts
        ],
    )


def ranks_rows(report: RunReport) -> list[tuple[str, str]]:
    """A row for each of several processes; none for one. The slowest is the one that waited least."""
    if not report.ranks:
        return []
    slowest = slowest_rank(report.ranks)
    return [
        (
            f"rank {one.rank} on {one.host}",
            f"{one.device}, waited {fmt.duration(one.waited_seconds)}, sent {fmt.size(one.sent_bytes)}"
            f"{', the slowest' if one is slowest else ''}",
        )
        for one in report.ranks
    ]


def trial_summary(report: TrialReport) -> Group:
    """The result of `gptq quantize --blocks N`."""
    done = number_of(len(report.blocks), "block")
    title = Text(f" {report.model}", style="bold", overflow="fold")
    title.append(f": the whole would take about {fmt.duration(report.seconds)}", style="default not bold")
    took = f"{fmt.duration(report.block_seconds)}, planned {fmt.duration(report.planned_block_seconds)}"
    phases = ", ".join(f"{phase} {fmt.duration(seconds)}" for phase, seconds in report.phase_seconds)
    disk = report.size_after_bytes + report.gradient_bytes + 2 * report.snapshot_bytes
    rows: list[tuple[str, RenderableType]] = [
        ("trial", f"{done} of {report.blocks_total}, nothing was written"),
        ("device", ", ".join(report.devices)),
        ("blocks", took),
        ("other time", phases),
        *listed("peak memory", peaks(report)),
        ("disk", f"{fmt.size(disk)} while the whole works, {fmt.size(report.size_after_bytes)} afterwards"),
        *warnings_rows(report.warnings),
    ]
    return Group(title, "", facts_table(rows))


def _run_rows(report: RunReport) -> list[tuple[str, RenderableType]]:
    smaller = report.size_before_bytes / report.size_after_bytes if report.size_after_bytes else 0.0
    sizes = f"{fmt.size(report.size_before_bytes)} -> {fmt.size(report.size_after_bytes)}"
    revision = f" @ {report.revision[:12]}" if report.revision else ""
    dense = f"; dense: {', '.join(report.dense_modules)}" if report.dense_modules else ""
    blocks = sum(block.seconds for block in report.blocks)
    spent = [*report.phase_seconds]
    if blocks and "blocks" not in dict(spent):
        at = next((i for i, (phase, _) in enumerate(spent) if phase == "save"), len(spent))
        spent.insert(at, ("blocks", blocks))
    rows: list[tuple[str, RenderableType]] = [
        ("model", f"{report.model}{revision}"),
        *([("source", report.source_format)] if report.source_format != "dense" else []),
        ("checkpoint", recipe(report)),
        (
            "size",
            f"{sizes} ({smaller:.2f} times smaller), {report.bits_per_parameter:.3f} bits per parameter",
        ),
        ("quantized", f"{quantized_text(report)}{dense}"),
        *bit_choice_rows(report.bit_choice),
        *own_settings_rows(other_settings(report), report.kept_dense),
        *listed("calibration", _calibration(report)),
        ("dtype", f"{report.dtype}, use_cuda_fp16 {yes(report.use_cuda_fp16)}"),
        ("device", ", ".join(report.devices)),
        *listed("streaming", report.streaming),
        ("time", ", ".join(f"{phase} {fmt.duration(seconds)}" for phase, seconds in spent)),
        *_starts_rows(report),
        *listed("ranks", [f"{who}: {what}" for who, what in ranks_rows(report)]),
        *listed("peak memory", peaks(report)),
    ]
    mean, nearest = report.mean_loss, report.mean_rtn_loss
    if mean is not None and nearest is not None:
        change = fmt.change(mean, nearest)
        against = f"round-to-nearest {fmt.loss(nearest)}{f' ({change})' if change else ''}"
        rows.append(("mean loss", f"{fmt.loss(mean)}, {against}"))
    if report.tuning is not None:
        rows.append(("tuned", report.tuning.words))
    if report.experts is not None:
        rows.append(("experts", fmt.experts(report.experts)))
    rows.append(("fallbacks", _fallbacks(report)))
    rows += warnings_rows(report.warnings)
    return rows


def _calibration(report: RunReport) -> list[str]:
    """`pydoc, 128 x 512 = 65,536 tokens, seed 0`; of several sources, one line each below that of all."""
    tokens = f"{report.samples} x {report.seq_len} = {report.tokens:,} tokens, seed {report.seed}"
    texts = report.calibration_texts
    if len(texts) == 1:
        return [f"{texts[0].source}, {tokens}"]
    return [f"{len(texts)} sources, {tokens}", *(f"{x.source}, {fmt.share_size(x, report)}" for x in texts)]


def quantized_text(report: RunReport | QuantizePlan) -> str:
    """`78.9 % of the parameters, at 4.358 bits per weight`."""
    share = fmt.share(report.quantized_share)
    return f"{share} of the parameters, at {report.bits_per_weight:.3f} bits per weight"


def warnings_rows(warnings: Sequence[str], shown: Iterable[Finding] = ()) -> list[tuple[str, RenderableType]]:
    """The warnings of a report, without those that are findings which it shows anyhow."""
    known = {warning_text(FindingRaised(finding)) for finding in shown}
    left = [text for text in warnings if text not in known]
    return listed("warnings", [Text(text, style="yellow", overflow="fold") for text in left])


def listed(label: str, values: Sequence[RenderableType]) -> list[tuple[str, RenderableType]]:
    """Several values under one label."""
    return [(label if index == 0 else "", value) for index, value in enumerate(values)]


def _fallbacks(report: RunReport) -> Text:
    if not report.fallbacks:
        return Text("none")
    names = [linear.name for linear in report.linears if linear.method != "gptq"]
    listed = names_text(names, MODULES_NAMED)
    of = number_of(len(report.linears), "linear")
    text = f"{report.fallbacks} of {of} fell back to round-to-nearest"
    return Text(f"{text}: {listed}" if listed else text, style="bold red", overflow="fold")


def peaks(report: RunReport | TrialReport) -> list[str]:
    """`cuda:0 1.75 GiB, predicted 1.80 GiB (-3 %)`, one line per device."""
    predicted = dict(report.predicted_peak_bytes)
    lines = []
    for device, measured in report.measured_peak_bytes:
        expected = predicted.get(device)
        against = ""
        if expected:
            against = f", predicted {fmt.size(expected)} ({fmt.change(measured, expected)})"
        lines.append(f"{device} {fmt.size(measured)}{against}")
    return lines


def _list(title: str, headings: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    for heading in headings:
        table.add_column(justify="left" if heading == "method" else "right", no_wrap=True)
    table.add_row(f" {title}", *headings, style="bold")
    return table


def _worst(linears: Sequence[LinearReport]) -> Table:
    table = _list("worst linears", ("loss", "nearest", "change", "method"))
    for linear in linears:
        table.add_row(
            Text(f" {linear.name}"),
            fmt.loss(linear.loss),
            fmt.loss(linear.rtn_loss),
            fmt.change(linear.loss, linear.rtn_loss),
            method_text(linear.method, linear.attempts),
            style="bold red" if linear.method != "gptq" else "",
        )
    return table


def _slowest(linears: Sequence[LinearReport]) -> Table:
    table = _list("slowest linears", ("seconds", "out x in"))
    for linear in linears:
        shape = f"{linear.out_features} x {linear.in_features}"
        table.add_row(Text(f" {linear.name}"), f"{linear.seconds:.2f}", shape)
    return table


def quoted(path: str) -> str:
    """`path` quoted for a shell."""
    return shlex.quote(path)
