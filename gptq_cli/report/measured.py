"""What was measured of a checkpoint, for every page that shows it: tiles, tables, gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gptq_cli.display import format as fmt
from gptq_cli.display.load import score_text
from gptq_cli.report import html
from gptq_cli.report.html import Cell, Markup, Tile
from gptq_cli.results.load import Bench, LoadReport, Rate, TaskScore
from gptq_cli.wording import number_of

KL_EXPLAINED = "KL(dense, quantized): how far the predictions moved, in nats per token; 0 is not at all."


def measured_tiles(report: LoadReport) -> Iterator[Tile]:
    """The figures that are read first; a gate that failed colours them."""
    failed = {gate.name: f"above {gate.option}" for gate in report.gates if not gate.passed}
    if report.agreement is not None:
        same = f"{fmt.share(report.agreement.top1)} of the tokens have the same prediction"
        tone = _tone("max_kl" in failed)
        yield Tile("KL to the dense model", fmt.loss(report.agreement.kl), failed.get("max_kl", same), tone)
    if report.perplexity is not None:
        beside = ""
        if report.agreement is not None:
            gap = 100 * report.agreement.perplexity_gap
            beside = f"dense {report.agreement.dense_perplexity:.3f} ({gap:+.2f} %)"
        tone = _tone("max_perplexity" in failed)
        figure = f"{report.perplexity:.3f}"
        yield Tile("perplexity", figure, failed.get("max_perplexity", beside), tone)
    if report.bench is not None:
        ratio = report.bench.decode_ratio
        beside = f"{fmt.ratio(ratio)} times the dense model" if ratio is not None else "one by one"
        rate = report.bench.speed.decode.tokens_per_second
        yield Tile("tokens per second", f"{rate:.1f}", beside)


def _tone(failed: bool) -> html.Tone:
    return "bad" if failed else ""


def measured(report: LoadReport) -> list[Markup]:
    """The parts of the section about it."""
    parts = [html.facts(_figures(report))]
    if report.agreement is not None:
        parts.append(html.paragraph(KL_EXPLAINED))
    if report.gates:
        rows = [
            (
                gate.option,
                f"{gate.found:.4g}",
                Cell("passed", "good") if gate.passed else Cell("FAILED", "bad"),
            )
            for gate in report.gates
        ]
        parts += [html.heading("Gates"), html.table(("gate", "found", ""), rows, "Gates")]
    if report.tasks:
        parts += [html.heading("Tasks"), _tasks(report.tasks)]
    if report.bench is not None:
        parts += [html.heading("Speed"), _speed(report.bench)]
    return [part for part in parts if part]


def _figures(report: LoadReport) -> Iterator[tuple[str, str]]:
    if report.perplexity is not None:
        over = fmt.evaluated(report, report.text_source or "a text")
        yield "perplexity", f"{report.perplexity:.3f}, {over}"
    if report.agreement is not None:
        held = report.agreement
        yield "dense perplexity", f"{held.dense_perplexity:.3f}, {report.against or 'the dense model'}"
        yield "KL(dense, quantized)", f"{fmt.loss(held.kl)} nats per token"
        yield "same most likely token", f"{fmt.share(held.top1)} of {number_of(held.tokens, 'token')}"
    for one in report.kernels:
        yield "kernels", f"{one.kernel} for {number_of(one.linears, 'linear')}: {one.reason}"


def _tasks(scores: Sequence[TaskScore]) -> Markup:
    dense = any(one.dense is not None for one in scores)
    rows = [
        (
            one.task,
            one.metric,
            score_text(one),
            *((fmt.score(one.dense), fmt.score(one.lost)) if dense else ()),
            "" if one.shots is None else str(one.shots),
            "" if one.samples is None else f"{one.samples:,}",
        )
        for one in scores
    ]
    heads = ("task", "metric", "score", *(("dense", "lost") if dense else ()), "shots", "questions")
    return html.table(heads, rows, "Scores of lm-evaluation-harness", words=2)


def _speed(bench: Bench) -> Markup:
    """Tokens per second, weights and memory, beside the dense model's where that was timed."""
    speed, dense = bench.speed, bench.dense_speed
    rates = [
        (f"prompt of {speed.prompt_tokens}", speed.prompt, dense and dense.prompt, bench.prompt_ratio),
        (f"{speed.new_tokens} one by one", speed.decode, dense and dense.decode, bench.decode_ratio),
    ]
    rows: list[tuple[str | Cell, ...]] = []
    for label, ours, theirs, ratio in rates:
        most = max(ours.tokens_per_second, theirs.tokens_per_second if theirs else 0.0) or 1.0
        beside = (_rate(theirs, most), fmt.ratio(ratio)) if theirs else ()
        rows.append((f"tokens per second, {label}", _rate(ours, most), *beside))
    weights = (fmt.size(bench.dense_weight_bytes or 0), fmt.ratio(bench.weight_ratio)) if dense else ()
    rows.append(("weights", fmt.size(bench.weight_bytes), *weights))
    empty = ("", "") if dense else ()
    rows += [(f"memory of {device}", fmt.size(used), *empty) for device, used in bench.memory]
    heads = ("", "quantized", *(("dense", "ratio") if dense else ()))
    return html.table(heads, rows, f"Speed, median and interquartile range of {speed.rounds} rounds")


def _rate(rate: Rate, most: float) -> Cell:
    text = f"{rate.tokens_per_second:.1f} ± {rate.spread:.1f}"
    return Cell(text, share=rate.tokens_per_second / most)
