"""Tables of `gptq load`: the summary of a loaded model, and the result of verifying files, rule by rule.

As in `tables.py`, frames and colours carry no meaning that the text does not, and nothing is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from gptq_cli.display import format as fmt
from gptq_cli.display.tables import (
    LEVEL_STYLES,
    Hint,
    facts_table,
    listed,
    modules_text,
    recipe,
    run_summary,
    warnings_rows,
    yes,
)
from gptq_cli.findings import Finding
from gptq_cli.results.load import (
    Agreement,
    Bench,
    Gate,
    KernelCount,
    LoadReport,
    Outcome,
    Rate,
    RuleResult,
    TaskScore,
    VerifyReport,
)
from gptq_cli.results.push import PushReport
from gptq_cli.results.run import RunReport
from gptq_cli.wording import number_of

NARROW = 70
"""Columns below which scores are words."""
_STYLES: dict[Outcome, str] = {
    "ok": "green",
    "note": LEVEL_STYLES["note"],
    "warning": LEVEL_STYLES["warning"],
    "error": LEVEL_STYLES["error"],
}


def load_summary(report: LoadReport) -> Group:
    """What was loaded, on which device and why, and what was measured. Generated text comes before this."""
    title = Text(f" {report.path}", style="bold green")
    title.append(f" is loaded, {number_of(report.linears, 'quantized linear')}", style="default not bold")
    warnings = warnings_rows(report.warnings, _findings(report.verification))
    parts: list[RenderableType] = [title, "", facts_table([*_opened(report), *_figures(report), *warnings])]
    parts += _tables(report)
    if report.verification is not None:
        parts += ["", verify_summary(report.verification)]
    return Group(*parts)


def quantized_summary(report: RunReport) -> Group:
    """The result of `gptq quantize`, with what was measured of the checkpoint, where that was asked for."""
    parts: list[RenderableType] = [run_summary(report)]
    if report.proof is not None:
        parts += ["", _measured(report.proof)]
    if report.pushed is not None:
        parts += ["", push_summary(report.pushed)]
    return Group(*parts)


def push_summary(report: PushReport) -> Text:
    """The result of an upload."""
    shown = Text(f" {report.repo_id}", style="bold green", overflow="fold")
    took = f" is on the Hub after {fmt.duration(report.seconds)}: {report.url}"
    return shown.append(took, style="default not bold")


def _measured(proof: LoadReport) -> Group:
    measured = [*listed("kernels", [kernel_text(one) for one in proof.kernels]), *_figures(proof)]
    return Group(facts_table(measured), *_tables(proof))


def _tables(report: LoadReport) -> list[RenderableType]:
    """What is measured in several rows, each after an empty line."""
    parts: list[RenderableType] = []
    if report.tasks:
        parts += ["", tasks_table(report.tasks)]
    if report.bench is not None:
        parts += ["", bench_table(report.bench)]
    return parts


def _opened(report: LoadReport) -> Iterator[tuple[str, RenderableType]]:
    by = f", written by {report.quantizer}" if report.quantizer else ""
    speed = report.weight_bytes / report.load_seconds if report.load_seconds else 0.0
    rate = f" ({fmt.size(speed)}/s)" if speed else ""
    compiled = ", compiled" if report.compiled else ""
    yield "checkpoint", f"{recipe(report)}{by}"
    yield "device", f"{report.device_map}: {report.device_reason}"
    yield "dtype", f"{report.dtype}, use_cuda_fp16 {yes(report.use_cuda_fp16)}{compiled}"
    yield from listed("kernels", [kernel_text(kernel) for kernel in report.kernels])
    yield "weights", f"{fmt.size(report.weight_bytes)} in {fmt.duration(report.load_seconds)}{rate}"
    yield from listed("memory", [f"{device} {fmt.size(used)}" for device, used in report.memory])


def _figures(report: LoadReport) -> Iterator[tuple[str, RenderableType]]:
    if report.perplexity is not None:
        over = f" over {fmt.evaluated(report, report.text_source or '')}"
        yield "perplexity", Text(f"{report.perplexity:.3f}", style="bold").append(over, style="not bold")
    if report.agreement is not None:
        yield from _compared(report.against or "", report.agreement)
    if report.new_tokens:
        rate = f", {report.tokens_per_second:.1f} per second" if report.tokens_per_second else ""
        yield "generated", f"{number_of(report.new_tokens, 'token')}{rate}"
    yield from listed("gates", [gate_text(gate) for gate in report.gates])


def _findings(report: VerifyReport | None) -> Iterator[Finding]:
    """All findings of a verification, rule by rule."""
    if report is not None:
        yield from report.findings
        for target in report.targets:
            yield from target.findings


def _compared(against: str, agreement: Agreement) -> Iterator[tuple[str, RenderableType]]:
    gap = 100 * agreement.perplexity_gap
    yield "against", f"{against}: perplexity {agreement.dense_perplexity:.3f} ({gap:+.2f} % here)"
    yield "KL", Text(f"{fmt.loss(agreement.kl)}", style="bold").append(" nats per token", style="not bold")
    tokens = number_of(agreement.tokens, "token", "has", "have")
    yield "top-1", f"{fmt.share(agreement.top1)} of {tokens} the same prediction"


def kernel_text(kernel: KernelCount) -> str:
    """`cpu-int4 for 180 linears: bfloat16 on a CPU`."""
    return f"{kernel.kernel} for {number_of(kernel.linears, 'linear')}: {kernel.reason}"


def gate_text(gate: Gate) -> Text:
    """`passed  max_kl 0.05, found 0.0213`."""
    word, style = ("passed", "green") if gate.passed else ("FAILED", "bold red")
    about = f" {gate.subject}" if gate.subject else ""
    return Text(f"{word}  {gate.name}{about} {gate.limit:g}, found {gate.found:.4g}", style=style)


def tasks_table(scores: Sequence[TaskScore]) -> RenderableType:
    """A row per metric of each task: its score, and where it was measured the dense model's."""
    return _Scores(scores)


class _Scores:
    """Columns where they fit, and below `NARROW` a line of words for each score."""

    def __init__(self, scores: Sequence[TaskScore]) -> None:
        self._scores = scores

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < NARROW:
            yield facts_table([(f"{one.task}, {one.metric}", score_words(one)) for one in self._scores])
        else:
            yield _score_columns(self._scores)


def score_words(one: TaskScore) -> str:
    """`0.4213 ± 0.0101 (dense 0.4312, lost 0.0099), 2,376 asked`."""
    beside = f" (dense {fmt.score(one.dense)}, lost {fmt.score(one.lost)})" if one.dense is not None else ""
    asked = "" if one.samples is None else f", {one.samples:,} asked"
    return f"{score_text(one)}{beside}{asked}"


def _score_columns(scores: Sequence[TaskScore]) -> Table:
    dense = any(one.dense is not None for one in scores)
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(overflow="fold")
    for _ in range(4 if dense else 2):
        table.add_column(justify="right", no_wrap=True)
    table.add_row(" task", "metric", "score", *(("dense", "lost") if dense else ()), "asked", style="bold")
    task = ""
    for one in scores:
        beside = (fmt.score(one.dense), fmt.score(one.lost)) if dense else ()
        asked = "" if one.samples is None else f"{one.samples:,}"
        table.add_row(f" {one.task}" if one.task != task else "", one.metric, score_text(one), *beside, asked)
        task = one.task
    return table


def score_text(one: TaskScore) -> str:
    """`0.4213 ± 0.0101`: the score and its standard error."""
    return fmt.score(one.value) if one.stderr is None else f"{fmt.score(one.value)} ± {fmt.score(one.stderr)}"


def bench_table(bench: Bench) -> Table:
    """Tokens per second with their spread, weights, memory; beside it the dense model, if it was timed."""
    dense = bench.dense_speed
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    for _ in range(3 if dense else 1):
        table.add_column(justify="right", no_wrap=True)
    speed = bench.speed
    heading = f" tokens per second, median of {speed.rounds}"
    table.add_row(heading, "quantized", *(("dense", "ratio") if dense else ()), style="bold")
    for label, ours, theirs, ratio in (
        (f" prompt of {speed.prompt_tokens}", speed.prompt, dense and dense.prompt, bench.prompt_ratio),
        (f" {speed.new_tokens} one by one", speed.decode, dense and dense.decode, bench.decode_ratio),
    ):
        table.add_row(label, rate_text(ours), *((rate_text(theirs), fmt.ratio(ratio)) if theirs else ()))
    beside = (fmt.size(bench.dense_weight_bytes or 0), fmt.ratio(bench.weight_ratio)) if dense else ()
    table.add_row(" weights", fmt.size(bench.weight_bytes), *beside)
    for device, used in bench.memory:
        table.add_row(f" memory of {device}", fmt.size(used), *(("", "") if dense else ()))
    return table


def rate_text(rate: Rate) -> str:
    """`812.3 ± 12.0`: median and interquartile range."""
    return f"{rate.tokens_per_second:.1f} ± {rate.spread:.1f}"


def verify_summary(report: VerifyReport) -> Group:
    """The checks of the files, then the rules of every target, each with its result."""
    verdict, style = ("is sound", "bold green") if report.sound else ("is not sound", "bold red")
    complete = len(report.checks) > 1
    title = Text(f" {report.path}", style=style if complete or not report.sound else "bold green")
    tensors, linears = report.tensors or 0, report.linears or 0
    counted = f"{number_of(tensors, 'tensor')}, {number_of(linears, 'quantized linear')}"
    share = f"{fmt.share(report.coverage or 0.0)} of the weights in the blocks"
    facts = f": {counted}, {share}" if tensors else ""
    shown = verdict if complete or not report.sound else "is readable"
    title.append(f" {shown}{facts}", style="default not bold")
    parts: list[RenderableType] = [title, "", rules_table(report.checks)]
    for target in report.targets:
        word, style = ("takes it", "green") if target.ok else ("WILL NOT take it", "bold red")
        heading = Text(f" {target.target}", style="bold").append(f" {word}", style=style)
        parts += ["", heading, "", rules_table(target.rules)]
    beyond = warnings_rows(report.warnings, _findings(report))
    if beyond:
        parts += ["", facts_table(beyond)]
    return Group(*parts)


def rules_table(results: Iterable[RuleResult]) -> Table:
    """One row per rule: its outcome and its subject; below, its findings and what to do."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for result in results:
        outcome = Text(f" {result.outcome}", style=_STYLES[result.outcome])
        table.add_row(outcome, Text(result.rule, style="bold"), Text(result.about, style="dim"))
        for finding in result.findings:
            about = f"{finding.subject}: " if finding.modules else ""
            level = Text(finding.level, style=_STYLES[finding.level])
            table.add_row("", level, Text(f"{about}{finding.message}"))
            if len(finding.modules) > 1:
                table.add_row("", "", Text(modules_text(finding), style="dim"))
            if finding.hint:
                table.add_row("", Text("hint", style="cyan"), Hint(finding.hint))
    return table
