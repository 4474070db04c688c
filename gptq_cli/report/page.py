"""`report_html(report)`: a run as one HTML page that can be mailed. No script, font or image from elsewhere.

It follows the reader's light or dark setting, has headings, and repeats the data of its plots in a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from gptq_cli.display import format as fmt
from gptq_cli.display.escapes import escaped
from gptq_cli.report.svg import Series, plot
from gptq_cli.results.load import LoadReport
from gptq_cli.results.run import BlockReport, LinearReport, RunReport, Setting

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5b6470; --line: #d5dae0;
        --s0: #1f6feb; --s1: #8a6d00; --s2: #c4290a; --s3: #0a7f42; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #14171b; --soft: #a2abb6;
        --line: #333a42; --s0: #79b1ff; --s1: #e0b84c; --s2: #ff8b6b; --s3: #63d19b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.sub { color: var(--soft); margin: .2rem 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
.bad { color: var(--s2); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); }
th.n, td.n { text-align: right; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg text.legend { fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; }
.s0 { fill: var(--s0); stroke: var(--s0); } .s1 { fill: var(--s1); stroke: var(--s1); }
.s2 { fill: var(--s2); stroke: var(--s2); } .s3 { fill: var(--s3); stroke: var(--s3); }
.ring { fill: none; stroke-width: 1.5; } .line, .dashes { fill: none; stroke-width: 2; }
.dashes { stroke-dasharray: 6 4; } .bar { stroke: none; }
"""


def report_html(report: RunReport) -> str:
    """The complete page. The same report gives the same bytes."""
    report = escaped(report)  # in a page, too, no character may reverse the text
    title = f"GPTQ run: {report.model}, {report.bits} bits"
    command = " ".join(report.command_line)  # "" for a run from Python
    recipe = f"{report.bits} bits, group size {report.group_size}, format {report.checkpoint_format}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(recipe)}, {escape(fmt.duration(report.seconds))}</p>',
        *_section("Result", _facts(_result(report))),
    ]
    if report.proof is not None:
        body += _section("Measured", _facts(_measured(report.proof)))
    if report.warnings:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
        body += _section("Warnings", f"<ul>{items}</ul>")
    if report.blocks:
        body += [
            *_section("Loss per linear", _loss_per_linear(report)),
            *_section("Loss per block", loss_per_block(report)),
            *_section("Memory per block", _memory(report)),
            *_section("Seconds per block", _seconds(report)),
            *_section("All linears", _linear_table(report.linears)),
        ]
    body += [
        *_section("Settings", _facts([(name, _plain(value)) for name, value in report.settings])),
        *_section("Versions", _facts(report.versions)),
        *(_section("Command", f"<p><code>{escape(command)}</code></p>") if command else ()),
    ]
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>"
    )
    inner = "\n".join(body)
    return f"{head}\n<body>\n<main>\n{inner}\n</main>\n</body>\n</html>\n"


def _section(title: str, inner: str) -> list[str]:
    return [f"<section>\n<h2>{escape(title)}</h2>", inner, "</section>"]


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in rows) + "</dl>"


def _plain(value: Setting) -> str:
    if value in (None, ()):
        return "default"
    if isinstance(value, tuple):
        return ", ".join(value)
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _result(report: RunReport) -> list[tuple[str, str]]:
    fallbacks = f"{report.fallbacks} of {fmt.count(len(report.linears), 'linear')} (round-to-nearest)"
    predicted = dict(report.predicted_peak_bytes)
    rows = [
        ("model", report.model),
        ("revision", report.revision or "local"),
        ("checkpoint", report.out),
        ("size", f"{fmt.size(report.size_before_bytes)} before, {fmt.size(report.size_after_bytes)} after"),
        ("bits per parameter", f"{report.bits_per_parameter:.3f}, all of the checkpoint"),
        ("bits per quantized weight", f"{report.bits_per_weight:.3f}"),
        ("quantized", f"{fmt.share(report.quantized_share)} of the parameters"),
        *(
            ("by module", f"{one.name}: {one.bits} bits, {fmt.group(one.group_size)}")
            for one in report.own_settings
        ),
        *(
            ("stays dense", f"{one.name}: {one.reason}, {fmt.count(one.linears, 'linear')}")
            for one in report.kept_dense
        ),
        ("dense", ", ".join(report.dense_modules) or "nothing"),
        ("dtype", f"{report.dtype}, use_cuda_fp16 {_plain(report.use_cuda_fp16)}"),
        *(
            ("calibration", f"{share.source}: {fmt.share_size(share, report)}")
            for share in report.calibration_texts
        ),
        ("data sha256", report.dataset_sha256),
        ("seed", str(report.seed)),
        ("fallbacks", fallbacks if report.fallbacks else "none"),
    ]
    if report.experts is not None:
        rows.append(("experts", fmt.experts(report.experts)))
    for device, measured in report.measured_peak_bytes:
        expected = f", predicted {fmt.size(predicted[device])}" if device in predicted else ""
        rows.append((f"peak on {device}", f"{fmt.size(measured)}{expected}"))
    spent = ", ".join(f"{phase} {fmt.duration(seconds)}" for phase, seconds in report.phase_seconds)
    return [*rows, ("phases", spent)] if spent else rows


def _measured(proof: LoadReport) -> list[tuple[str, str]]:
    """What was measured of the checkpoint after it was put in place."""
    rows = [
        (f"kernel {one.kernel}", f"{fmt.count(one.linears, 'linear')}: {one.reason}") for one in proof.kernels
    ]
    if proof.perplexity is not None:
        over = f"{fmt.windows(proof)} of {proof.text_source}"
        rows.append(("perplexity", f"{proof.perplexity:.3f}, {over}"))
    if proof.agreement is not None:
        same = f"{fmt.share(proof.agreement.top1)} of {proof.agreement.tokens:,} tokens"
        rows += [
            ("dense perplexity", f"{proof.agreement.dense_perplexity:.3f}"),
            ("KL(dense, quantized)", f"{fmt.loss(proof.agreement.kl)} nats per token"),
            ("same most likely token", same),
        ]
    if proof.bench is not None:
        for name, speed in (("speed", proof.bench.speed), ("dense speed", proof.bench.dense_speed)):
            if speed is not None:
                prompt, decode = speed.prompt.tokens_per_second, speed.decode.tokens_per_second
                rows.append((name, f"prompt {prompt:.1f}, one by one {decode:.1f} tokens per second"))
    for gate in proof.gates:
        verdict = "passed" if gate.passed else "FAILED"
        rows.append((gate.name, f"{verdict}: limit {gate.limit:g}, found {gate.found:.4g}"))
    return rows


def mean_loss(values: Iterable[float]) -> float | None:
    """The mean of those that are finite; None where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _block_names(blocks: Sequence[BlockReport]) -> list[str]:
    return [block.name.rpartition(".")[2] for block in blocks]


def _loss_per_linear(report: RunReport) -> str:
    linears = report.linears
    labels = tuple(_tooltip(linear) for linear in linears)
    owners = [
        name
        for block, name in zip(report.blocks, _block_names(report.blocks), strict=True)
        for _ in block.linears
    ] + (["head"] if report.head is not None else [])

    def losses_of(fallback: bool) -> tuple[float | None, ...]:
        return tuple(x.loss if (x.method != "gptq") is fallback else None for x in linears)

    nearest = tuple(x.rtn_loss for x in linears)
    series = [
        Series(name="round-to-nearest", values=nearest, mark="ring", style=1, labels=labels),
        Series(name="GPTQ", values=losses_of(False), mark="disc", style=0, labels=labels),
    ]
    if report.fallbacks:
        series.append(
            Series(name="fallback", values=losses_of(True), mark="triangle", style=2, labels=labels)
        )
    better = sum(1 for x in linears if x.loss < x.rtn_loss)
    about = f"{better} of {len(linears)} linears have a lower loss than round-to-nearest; logarithmic axis"
    return plot("Relative loss of each linear", about, series, x_names=owners, unit=_number, log=True)


def _tooltip(linear: LinearReport) -> str:
    how = "" if linear.method == "gptq" else f", FALLBACK {linear.method}"
    return f"{linear.name}: {fmt.loss(linear.loss)}, round-to-nearest {fmt.loss(linear.rtn_loss)}{how}"


def loss_per_block(report: RunReport) -> str:
    """The plot of the mean loss of each block, as an `<svg>`."""
    ours = tuple(mean_loss(x.loss for x in block.linears) for block in report.blocks)
    nearest = tuple(mean_loss(x.rtn_loss for x in block.linears) for block in report.blocks)
    series = [
        Series(name="round-to-nearest", values=nearest, mark="dashes", style=1),
        Series(name="GPTQ", values=ours, mark="line", style=0),
    ]
    about = "Mean relative loss of the linears of each block, GPTQ against round-to-nearest"
    return plot("Mean loss of each block", about, series, x_names=_block_names(report.blocks), unit=_number)


def _memory(report: RunReport) -> str:
    devices = dict.fromkeys(device for block in report.blocks for device, _ in block.peak_bytes)
    predicted = dict(report.predicted_peak_bytes)
    series = []
    for number, device in enumerate(devices):
        held = tuple(dict(block.peak_bytes).get(device) for block in report.blocks)
        style = (0, 3, 1, 2)[number % 4]
        values = tuple(None if value is None else value / 2**30 for value in held)
        series.append(Series(name=device, values=values, mark="line", style=style))
        if device in predicted:
            flat = (predicted[device] / 2**30,) * len(report.blocks)
            series.append(Series(name=f"{device} predicted", values=flat, mark="dashes", style=style))
    about = "Highest allocated bytes on each device while a block was quantized, and the prediction"
    return plot("Peak memory of each block", about, series, x_names=_block_names(report.blocks), unit=_gib)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _gib(value: float) -> str:
    return f"{value:.3g} GiB"


def _seconds(report: RunReport) -> str:
    values = tuple(block.seconds for block in report.blocks)
    labels = tuple(f"{block.name}: {fmt.duration(block.seconds)}" for block in report.blocks)
    series = [Series(name="seconds", values=values, mark="bar", style=0, labels=labels)]
    about = f"Wall seconds of each block, {sum(values):.1f} in all"
    return plot(
        "Seconds of each block", about, series, x_names=_block_names(report.blocks), unit=lambda x: f"{x:g} s"
    )


def _linear_table(linears: Sequence[LinearReport]) -> str:
    numbers = (
        "out x in",
        "bits",
        "group",
        "loss",
        "nearest",
        "change",
        "damping",
        "tries",
        "tokens",
        "seconds",
    )
    heads = "".join(f'<th scope="col" class="n">{name}</th>' for name in numbers)
    rows = []
    for x in linears:
        cells = [
            f"{x.out_features} x {x.in_features}",
            str(x.bits),
            str(x.group_size),
            fmt.loss(x.loss),
            fmt.loss(x.rtn_loss),
            fmt.change(x.loss, x.rtn_loss),
            f"{x.damp_percent:g}",
            str(x.attempts),
            f"{x.tokens:,}",
            f"{x.seconds:.2f}",
        ]
        figures = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        method = x.method if x.method == "gptq" else f'<span class="bad">FALLBACK {escape(x.method)}</span>'
        rows.append(f"<tr><td>{escape(x.name)}</td>{figures}<td>{method}</td></tr>")
    head = f'<thead><tr><th scope="col">linear</th>{heads}<th scope="col">method</th></tr></thead>'
    body = "\n".join(rows)
    summary = f"<summary>{fmt.count(len(linears), 'linear')}</summary>"
    return (
        f'<details>{summary}<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div></details>'
    )
