"""`report_html(report)`: a run as one HTML page that can be mailed. No script, font or image from elsewhere.

It follows the reader's light or dark setting, fits a telephone, and has every figure of its plots in a table
or a description too. `measured_tiles` and `measured` are what was proved of a checkpoint, which the page of
`gptq load` shows as well.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

from gptq_cli import __version__
from gptq_cli.display import format as fmt
from gptq_cli.display.bits import bits_rows, bits_text
from gptq_cli.display.escapes import escaped
from gptq_cli.display.tables import other_settings, ranks_rows, recipe, yes
from gptq_cli.events import FindingRaised, warning_text
from gptq_cli.findings import PreflightReport
from gptq_cli.report import html
from gptq_cli.report.experts import experts
from gptq_cli.report.html import Cell, Markup, Section, Tile
from gptq_cli.report.measured import measured, measured_tiles
from gptq_cli.report.plots import (
    LOSS_EXPLAINED,
    kind_of,
    loss_per_block,
    loss_per_linear,
    memory_per_block,
    seconds_per_block,
)
from gptq_cli.results.bits import BitChoice
from gptq_cli.results.run import LinearReport, RunReport, finite_mean
from gptq_cli.wording import number_of

WORST = 10
MOST_ROWS = 2000
"""Linears with a row each; of more than that, the experts of a block have one together."""
TUNING_EXPLAINED = (
    "When all blocks were packed, scales, norms and biases were tuned on the dense model's logits:"
)
MADE_BY = f"Made by gptq-cli {__version__}. Every figure is in report.json."


def report_html(report: RunReport) -> str:
    """The complete page. The same report gives the same bytes."""
    report = escaped(report)  # in a page, too, no character may reverse the text
    return html.page(
        report.model,
        f"Quantized with GPTQ: {recipe(report)}",
        list(_tiles(report)),
        _sections(report),
        MADE_BY,
    )


def _sections(report: RunReport) -> Iterator[Section]:
    yield Section("Findings", _findings(report))
    yield Section("Measured", measured(report.proof) if report.proof is not None else ())
    yield Section("Loss", list(_loss(report)))
    yield Section("Bits", list(_bits(report.bit_choice)) if report.bit_choice is not None else ())
    yield Section("Experts", experts(report))
    yield Section("Memory and time", list(_memory_and_time(report)) if report.blocks else ())
    yield Section("Checkpoint", [html.facts(_checkpoint(report))])
    yield Section("Calibration", [html.facts(_calibration(report))])
    yield Section("Linears", _linears(report))
    yield Section("How it was made", list(_how(report)))


def _tiles(report: RunReport) -> Iterator[Tile]:
    before, after = report.size_before_bytes, report.size_after_bytes
    smaller = f", {before / after:.2f} times smaller" if after else ""
    yield Tile("size", fmt.size(after), f"{fmt.size(before)} before{smaller}")
    ours, nearest = report.mean_loss, report.mean_rtn_loss
    if ours is not None:
        change = fmt.change(ours, nearest) if nearest is not None else ""
        yield Tile("mean loss", fmt.loss(ours), f"{change} against round-to-nearest" if change else "")
    if report.proof is not None:
        yield from measured_tiles(report.proof)
    estimate = report.predicted_seconds
    beside = f"estimated {fmt.duration(estimate)}" if estimate is not None else ""
    yield Tile("time", fmt.duration(report.seconds), beside)
    predicted = dict(report.predicted_peak_bytes)
    for device, peak in report.measured_peak_bytes:
        plan = f"predicted {fmt.size(predicted[device])}" if device in predicted else ""
        yield Tile(f"peak memory, {device}", fmt.size(peak), plan)
    failed = report.fallbacks
    of = f"of {number_of(len(report.linears), 'linear')}"
    yield Tile("fallbacks", str(failed) if failed else "none", of, "bad" if failed else "")


def _findings(report: RunReport) -> list[Markup]:
    """Findings, and warnings that are none."""
    known = {warning_text(FindingRaised(finding)) for finding in report.findings}
    shown = html.findings(PreflightReport(report.findings).ordered())
    others = html.warnings(text for text in report.warnings if text not in known)
    return [part for part in (shown, others) if part]


def _loss(report: RunReport) -> Iterator[Markup]:
    if not report.linears:
        return
    yield html.paragraph(LOSS_EXPLAINED)
    ours, nearest = report.mean_loss, report.mean_rtn_loss
    if ours is not None and nearest is not None:
        yield html.paragraph(
            f"The mean of all linears is {fmt.loss(ours)}, that of round-to-nearest {fmt.loss(nearest)}."
        )
    if report.tuning is not None:
        yield html.paragraph(f"{TUNING_EXPLAINED} {report.tuning.words}.")
    for plot in (loss_per_block(report), loss_per_linear(report)):
        yield html.figure(plot, plot.description)
    yield html.heading("Worst linears")
    yield _worst(report)


def _worst(report: RunReport) -> Markup:
    rows = [
        (x.name, _method(x), fmt.loss(x.loss), fmt.loss(x.rtn_loss), fmt.change(x.loss, x.rtn_loss))
        for x in sorted(report.linears, key=lambda x: x.loss, reverse=True)[:WORST]
    ]
    heads = ("linear", "method", "loss", "round-to-nearest", "change")
    return html.table(heads, rows, "The linears with the highest loss", words=2)


def _memory_and_time(report: RunReport) -> Iterator[Markup]:
    memory, seconds = memory_per_block(report), seconds_per_block(report)
    yield html.figure(memory, memory.description)
    yield html.figure(seconds, seconds.description)
    predicted = dict(report.predicted_peak_bytes)
    rows = [
        (f"peak on {device}", fmt.size(peak), *_beside(peak, predicted.get(device), fmt.size))
        for device, peak in report.measured_peak_bytes
    ]
    beside = _beside(report.seconds, report.predicted_seconds, fmt.duration)
    rows.append(("time", fmt.duration(report.seconds), *beside))
    yield html.table(("", "measured", "predicted", "difference"), rows, "Measured and predicted")
    spent = [(phase, fmt.duration(seconds)) for phase, seconds in report.phase_seconds]
    yield html.heading("Phases")
    yield html.facts(spent)
    if report.ranks:
        yield html.heading("Ranks")
        yield html.facts(ranks_rows(report))
    if len(report.starts) > 1:
        yield html.heading("Starts")
        yield html.facts(
            (
                start.started[:16].replace("T", " "),
                f"{fmt.duration(start.seconds)}, {number_of(start.blocks, 'block')} from {start.first_block}",
            )
            for start in report.starts
        )


def _beside(value: float, predicted: float | None, words: Callable[[float], str]) -> tuple[str, str]:
    return ("", "") if predicted is None else (words(predicted), fmt.change(value, predicted))


def _bits(choice: BitChoice) -> Iterator[Markup]:
    """How a budget of bits was spent: a row for each set of linears."""
    yield html.facts(bits_rows(choice))
    rows = [
        (
            ", ".join(one.linears),
            bits_text(one.bits),
            fmt.size(one.size_bytes),
            fmt.loss(one.kl),
        )
        for one in choice.fused
    ]
    whole = html.table(("linears", "bits", "size", "predicted KL"), rows, "The bits of all linears", words=2)
    yield html.folded(f"All {number_of(len(rows), 'set')} of linears", whole)


def _checkpoint(report: RunReport) -> Iterator[tuple[str, str]]:
    yield "directory", report.out
    yield "source", f"{report.model} @ {report.revision}" if report.revision else f"{report.model}, local"
    if report.source_format != "dense":
        yield "source format", report.source_format
    yield "bits per parameter", f"{report.bits_per_parameter:.3f}, all of the checkpoint"
    yield "bits per quantized weight", f"{report.bits_per_weight:.3f}"
    yield "quantized", f"{fmt.share(report.quantized_share)} of the parameters"
    for own in other_settings(report):
        yield "by module", f"{own.name}: {own.bits} bits, {fmt.group(own.group_size)}"
    for kept in report.kept_dense:
        yield "stays dense", f"{kept.name}: {kept.reason}, {number_of(kept.linears, 'linear')}"
    yield "dense modules", ", ".join(report.dense_modules) or "none"
    yield "dtype", f"{report.dtype}, use_cuda_fp16 {yes(report.use_cuda_fp16)}"
    if report.pushed is not None:
        yield "on the Hub", report.pushed.repo_id


def _calibration(report: RunReport) -> Iterator[tuple[str, str]]:
    for share in report.calibration_texts:
        yield "text", f"{share.source}: {fmt.share_size(share, report)}"
    if not report.calibration_texts:
        yield "text", report.calibration_source
    yield "windows", f"{report.samples} x {report.seq_len} = {report.tokens:,} tokens"
    yield "seed", str(report.seed)
    yield "sha256", report.dataset_sha256


def _linears(report: RunReport) -> list[Markup]:
    linears = report.linears
    if not linears:
        return []
    if len(linears) <= MOST_ROWS:
        whole = _linear_table(linears, "All linears")
        return [html.folded(f"All {number_of(len(linears), 'linear')}", whole)]
    folded = {
        f"{block.name}.{kind}": [x for x in block.linears if kind_of(x, block.name) == kind]
        for block in report.blocks
        for kind in dict.fromkeys(kind_of(x, block.name) for x in block.linears)
    }
    rows = _table_of_kinds(folded)
    return [html.folded(f"All {number_of(len(linears), 'linear')}, those of experts together", rows)]


def _table_of_kinds(folded: Mapping[str, Sequence[LinearReport]]) -> Markup:
    rows: list[tuple[str, ...]] = []
    for name, held in folded.items():
        ours, nearest = finite_mean(x.loss for x in held), finite_mean(x.rtn_loss for x in held)
        most = max(x.loss for x in held)
        change = fmt.change(ours, nearest) if ours is not None and nearest is not None else ""
        cells = [fmt.loss(value) if value is not None else "" for value in (ours, nearest)]
        rows.append((name, str(len(held)), *cells, change, fmt.loss(most)))
    heads = ("linears", "count", "mean loss", "nearest", "change", "highest loss")
    return html.table(heads, rows, "All linears, those of experts together")


def _linear_table(linears: Sequence[LinearReport], about: str) -> Markup:
    heads = ["linear", "method", "loss", "nearest", "change", "out x in"]
    heads += ["bits", "group", "damping", "tries", "tokens", "seconds"]
    rows = [
        (
            x.name,
            _method(x),
            fmt.loss(x.loss),
            fmt.loss(x.rtn_loss),
            fmt.change(x.loss, x.rtn_loss),
            f"{x.out_features} x {x.in_features}",
            str(x.bits),
            str(x.group_size),
            f"{x.damp_percent:g}",
            str(x.attempts),
            f"{x.tokens:,}",
            f"{x.seconds:.2f}",
        )
        for x in linears
    ]
    return html.table(heads, rows, about, words=2)


def _method(linear: LinearReport) -> Cell:
    failed = linear.method != "gptq"
    return Cell(f"FALLBACK {linear.method}", "bad") if failed else Cell(linear.method)


def _how(report: RunReport) -> Iterator[Markup]:
    if report.command_line:  # none for a run from Python
        yield html.preformatted(shlex.join(report.command_line))
    yield html.heading("Settings")
    yield html.facts((name, fmt.setting(value)) for name, value in report.settings)
    yield html.heading("Versions")
    yield html.facts(report.versions)
