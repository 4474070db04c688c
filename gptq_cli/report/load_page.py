"""`load_html(report)`: what `gptq load` found, as one HTML page: where it runs, figures, the files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gptq_cli.display import format as fmt
from gptq_cli.display.escapes import escaped, many_lines
from gptq_cli.display.tables import recipe, yes
from gptq_cli.events import FindingRaised, warning_text
from gptq_cli.findings import Finding
from gptq_cli.report import html
from gptq_cli.report.html import Cell, Markup, Section, Tile, Tone
from gptq_cli.report.measured import measured, measured_tiles
from gptq_cli.report.page import MADE_BY
from gptq_cli.results.load import LoadReport, Outcome, RuleResult, VerifyReport
from gptq_cli.wording import number_of

_TONES: dict[Outcome, Tone] = {"ok": "good", "note": "", "warning": "warn", "error": "bad"}


def load_html(report: LoadReport | VerifyReport) -> str:
    """The complete page. The same report gives the same bytes."""
    given, report = report, escaped(report)
    if isinstance(report, VerifyReport):
        verdict = "Checked by its files alone"
        figures, sections = list(_verified_tiles(report)), list(_verified(report))
        sections.insert(0, Section("Warnings", _warnings(report.warnings, report)))
    else:
        verdict = f"GPTQ checkpoint: {recipe(report)}"
        words = given.text if isinstance(given, LoadReport) else None
        figures, sections = list(_tiles(report)), list(_sections(report, words))
    return html.page(report.path, verdict, figures, sections, MADE_BY.partition(". ")[0] + ".")


def _tiles(report: LoadReport) -> Iterator[Tile]:
    failed = report.failures
    count = number_of(len(failed), "failure") if failed else ""
    yield Tile("verdict", "failed" if failed else "loads", count, "bad" if failed else "good")
    yield from measured_tiles(report)
    yield Tile("weights", fmt.size(report.weight_bytes), f"loaded in {fmt.duration(report.load_seconds)}")
    for device, used in report.memory:
        yield Tile(f"memory, {device}", fmt.size(used), "after loading")
    if report.verification is not None:
        yield from _verified_tiles(report.verification)


def _sections(report: LoadReport, text: str | None) -> Iterator[Section]:
    yield Section("Failures", [html.warnings(report.failures)] if report.failures else ())
    yield Section("Warnings", _warnings(report.warnings, report.verification))
    yield Section("Measured", measured(report))
    if text is not None:
        yield Section("Generated text", list(_generated(report, many_lines(text))))
    yield Section("Where it runs", [html.facts(_opened(report))])
    if report.verification is not None:
        yield from _verified(report.verification)


def _warnings(texts: Iterable[str], verification: VerifyReport | None) -> list[Markup]:
    """Those that are not findings, which have a place of their own."""
    found = () if verification is None else _all_findings(verification)
    known = {warning_text(FindingRaised(finding)) for finding in found}
    shown = html.warnings(text for text in texts if text not in known)
    return [shown] if shown else []


def _all_findings(report: VerifyReport) -> list[Finding]:
    return [*report.findings, *(finding for target in report.targets for finding in target.findings)]


def _generated(report: LoadReport, text: str) -> Iterator[Markup]:
    yield html.preformatted(report.prompt or "")
    yield html.preformatted(text)
    rate = f", {report.tokens_per_second:.1f} per second" if report.tokens_per_second else ""
    yield html.paragraph(f"{number_of(report.new_tokens or 0, 'token')}{rate}.")


def _opened(report: LoadReport) -> Iterator[tuple[str, str]]:
    yield "written by", report.quantizer or "not said by the files"
    yield "quantized linears", f"{report.linears:,}"
    yield "device", f"{report.device_map}: {report.device_reason}"
    yield "dtype", f"{report.dtype}, use_cuda_fp16 {yes(report.use_cuda_fp16)}"
    yield "compiled", yes(report.compiled)


def _verified_tiles(report: VerifyReport) -> Iterator[Tile]:
    yield Tile(
        "files",
        "sound" if report.sound else "not sound",
        f"{number_of(report.tensors, 'tensor')}, {fmt.size(report.size_bytes or 0)}"
        if report.tensors
        else "",
        "good" if report.sound else "bad",
    )
    for target in report.targets:
        yield Tile(target.target, "takes it" if target.ok else "refuses", "", "good" if target.ok else "bad")


def _verified(report: VerifyReport) -> Iterator[Section]:
    yield Section("Files", [_rules(report.checks, "Checks of the files"), html.findings(report.findings)])
    for target in report.targets:
        about = f"What {target.target} asks for"
        yield Section(target.target, [_rules(target.rules, about), html.findings(target.findings)])


def _rules(results: Iterable[RuleResult], about: str) -> Markup:
    rows = [(x.rule, Cell(x.outcome, _TONES[x.outcome]), x.about) for x in results]
    return html.table(("rule", "outcome", "what it checks"), rows, about, words=3)
