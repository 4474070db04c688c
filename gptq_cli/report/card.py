"""`card_files(report, facts)`: the model card of a checkpoint, README.md with a plot in a file of its own.

The front matter is what the Hub reads, the text is for people. Times, hosts and paths of this machine are not
in it: the same model, settings and text give the same bytes, whether or not the run was interrupted. What
came from outside (names, licence, tags) is written as text, never as markup.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path

import yaml

from gptq_cli import __version__
from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.display import format as fmt
from gptq_cli.display.bits import bits_rows, widths, widths_text
from gptq_cli.display.escapes import escaped
from gptq_cli.display.load import score_text
from gptq_cli.display.tables import other_settings
from gptq_cli.report.plots import LOSS_EXPLAINED, loss_per_block
from gptq_cli.report.style import plot_style
from gptq_cli.report.svg import drawing, standalone
from gptq_cli.results.bits import BitChoice
from gptq_cli.results.card import CARD, CardFacts
from gptq_cli.results.load import LoadReport, TargetReport, TaskScore
from gptq_cli.results.run import RunReport, Setting, finite_mean
from gptq_cli.wording import number_of

PLOT = "loss_per_block.svg"
_MARKS = re.compile(r"([\\`*_\[\]|~$])")
_READERS = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "Transformers"}


def card_files(report: RunReport, facts: CardFacts) -> Mapping[str, str]:
    """README.md, and the plot where there is a loss to show; names and texts."""
    report, facts = escaped(report), escaped(facts)
    svg = standalone(drawing(loss_per_block(report)), plot_style()) if report.blocks else ""
    text = "\n".join((*_front_matter(report, facts), *_body(report, facts, plotted=bool(svg)))) + "\n"
    return {CARD: text, PLOT: svg} if svg else {CARD: text}


def _front_matter(report: RunReport, facts: CardFacts) -> Iterator[str]:
    source = facts.source
    there = widths(report.bits, report.bit_choice, report.own_settings, len(report.linears))
    bits = [f"{one}-bit" for one in ((report.bits,) if report.bits in there else there)]
    held: dict[str, object] = {
        "base_model": facts.base_model,
        "base_model_relation": "quantized" if facts.base_model else "",
        "license": source.license,
        "license_name": source.license_name,
        "license_link": source.license_link,
        "language": list(source.language),
        "library_name": "transformers",
        "pipeline_tag": source.pipeline_tag or facts.pipeline_tag,
        "quantized_by": "gptq-cli",
        "tags": list(dict.fromkeys((*source.tags, "gptq", *bits, "gptq-cli"))),
    }
    if report.proof is not None and report.proof.tasks:
        held["model-index"] = [{"name": _title(report, facts), "results": _results(report.proof.tasks)}]
    given = {name: value for name, value in held.items() if value}
    yield "---"
    yield yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=2**20).rstrip("\n")
    yield "---"
    yield ""


def _results(scores: Iterable[TaskScore]) -> list[dict[str, object]]:
    """Scores as the Hub reads them (`model-index`)."""
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": one.task, "type": one.task},
            "metrics": [{"type": one.metric, "value": round(one.value, 6)}],
        }
        for one in scores
    ]


def _widths(report: RunReport) -> str:
    return widths_text(report.bits, report.bit_choice, report.own_settings, len(report.linears))


def _title(report: RunReport, facts: CardFacts) -> str:
    return f"{facts.base_model or 'a local model'}, GPTQ {_widths(report)}"


def _body(report: RunReport, facts: CardFacts, *, plotted: bool) -> Iterator[str]:
    base = facts.base_model or "a local model"
    yield f"# {text(_title(report, facts))}"
    yield ""
    symmetry = "symmetric" if report.sym else "asymmetric"
    yield (
        f"The linears of {text(base)} quantized to {_widths(report)} with GPTQ: "
        f"{fmt.group(report.group_size)}, {symmetry}, format {code(report.checkpoint_format)}, by "
        f"gptq-cli {__version__}."
    )
    yield ""
    yield from _fence("console", [shlex.join(command(report, facts))])
    yield "## Result"
    yield ""
    yield from _table(("", ""), _result(report))
    yield from _measured(report)
    if plotted:
        yield "## Loss per block"
        yield ""
        yield f"![{text(_plot_words(report))}]({PLOT})"
        yield ""
        yield LOSS_EXPLAINED
        yield ""
    yield "## Use"
    yield ""
    yield from _use(facts)
    yield "## What stays dense"
    yield ""
    yield from _dense(report)
    yield "## Files"
    yield ""
    yield "SHA-256 of the weights and configs, as `sha256sum -c` reads it:"
    yield ""
    yield from _fence("", [f"{digest}  {name}" for name, digest in facts.digests])


def command(report: RunReport, facts: CardFacts) -> list[str]:
    """The words of a command that makes these codes: every option that is not at its default."""
    words = ["gptq", "quantize", facts.base_model or "MODEL"]
    if report.revision:
        words += ["--revision", report.revision]
    words += ["--out", "DIR"]
    settings = dict(report.settings)
    for item in fields(QuantizeConfig):
        name = item.metadata.get("name", item.name)
        value = settings.get(name)
        option = "--" + name.replace("_", "-")
        if report.bit_choice is not None and name in _CHOSEN:
            value = _as_asked(name, report.bit_choice)
        if value is None or value == item.default:
            continue
        if isinstance(value, bool):
            words.append(option if value else "--" + item.metadata.get("off", f"no-{option[2:]}"))
        elif isinstance(value, tuple):
            words += [word for one in value for word in (option, one)]
        else:
            words += [option, str(value)]
    text_used = CalibrationConfig()
    if facts.calibration != tuple(map(str, text_used.sources)):
        words += [word for source in facts.calibration for word in ("--calibration", _public(source))]
    for option, used, default in (
        ("--samples", report.samples, text_used.samples),
        ("--seq-len", report.seq_len, text_used.seq_len),
        ("--seed", report.seed, text_used.seed),
    ):
        if used != default:
            words += [option, str(used)]
    return words


_CHOSEN = ("bits", "bits_per_weight", "module", "quantize_head")
"""Options that a budget of bits settled."""


def _as_asked(name: str, choice: BitChoice) -> Setting:
    """The value that was given."""
    if name == "bits_per_weight":
        return choice.asked
    if name == "module":
        return choice.given_modules
    return choice.quantize_head if name == "quantize_head" else None


def _public(source: str) -> str:
    """The name of a file without the directories of this machine; a data set as it is."""
    return Path(source).name if Path(source).is_absolute() or source.startswith(("./", "../")) else source


def _result(report: RunReport) -> Iterator[tuple[str, str]]:
    before, after = fmt.size(report.size_before_bytes), fmt.size(report.size_after_bytes)
    yield "size", f"{before} before, {after} after"
    yield "bits per parameter", f"{report.bits_per_parameter:.3f}, all of the checkpoint"
    yield "bits per quantized weight", f"{report.bits_per_weight:.3f}"
    yield "quantized", f"{fmt.share(report.quantized_share)} of the parameters"
    for label, words in bits_rows(report.bit_choice) if report.bit_choice is not None else ():
        yield label, text(words)
    for one in other_settings(report):
        yield "by module", f"{code(one.name)}: {one.bits} bits, {fmt.group(one.group_size)}"
    yield "dtype", code(report.dtype)
    for share in report.calibration_texts:
        yield "calibration", f"{fmt.share_size(share, report)} of {text(_public(share.source))}"
    yield "calibration sha256", code(report.dataset_sha256)
    ours, nearest = report.mean_loss, report.mean_rtn_loss
    if ours is not None and nearest is not None:
        yield "mean loss", f"{fmt.loss(ours)}, round-to-nearest {fmt.loss(nearest)}"
    count = number_of(len(report.linears), "linear")
    yield "fallbacks", f"{report.fallbacks} of {count} (round-to-nearest)" if report.fallbacks else "none"
    if report.experts is not None:
        yield "experts", text(fmt.experts(report.experts))


def _measured(report: RunReport) -> Iterator[str]:
    """Perplexity, divergence and scores on tasks, where the run measured them."""
    proof = report.proof
    if proof is None or (proof.perplexity is None and not proof.tasks):
        return
    yield "## Accuracy"
    yield ""
    if proof.perplexity is not None:
        yield from _perplexity(proof, proof.perplexity)
    if proof.tasks:
        yield from _tasks(proof.tasks)


def _perplexity(proof: LoadReport, perplexity: float) -> Iterator[str]:
    yield f"{fmt.evaluated(proof, text(_public(proof.text_source or '')))}."
    yield ""
    rows = [("perplexity", f"{perplexity:.3f}")]
    if proof.agreement is not None:
        rows += [
            ("perplexity of the dense model", f"{proof.agreement.dense_perplexity:.3f}"),
            ("KL(dense, quantized)", f"{fmt.loss(proof.agreement.kl)} nats per token"),
            ("same most likely token", f"{fmt.share(proof.agreement.top1)} of the tokens"),
        ]
    yield from _table(("", ""), rows)


def _tasks(scores: Sequence[TaskScore]) -> Iterator[str]:
    """One table; the dense model's scores where they were measured."""
    dense = any(one.dense is not None for one in scores)
    yield "Tasks of lm-evaluation-harness:"
    yield ""
    rows = [
        (
            *(code(one.task), code(one.metric), score_text(one)),
            *((fmt.score(one.dense),) if dense else ()),
            *("" if one.shots is None else str(one.shots), "" if one.samples is None else f"{one.samples:,}"),
        )
        for one in scores
    ]
    yield from _table(("task", "metric", "score", *(("dense",) if dense else ()), "shots", "questions"), rows)


def _plot_words(report: RunReport) -> str:
    means = [(block.name, finite_mean(x.loss for x in block.linears)) for block in report.blocks]
    known = [(name, value) for name, value in means if value is not None]
    if not known:
        return "Mean loss of each block"
    worst, best = max(known, key=lambda one: one[1]), min(known, key=lambda one: one[1])
    of = f"each of {number_of(len(means), 'block')}" if len(means) > 1 else "the one block"
    return (
        f"Mean loss of {of}, GPTQ against round-to-nearest: from "
        f"{fmt.loss(best[1])} ({best[0]}) to {fmt.loss(worst[1])} ({worst[0]})"
    )


def _use(facts: CardFacts) -> Iterator[str]:
    name = shlex.quote(facts.name)
    taken = {target.target for target in facts.targets if target.ok}
    if "vllm" in taken:
        yield from _fence("console", [f"vllm serve {name}"])
    if "sglang" in taken:
        yield from _fence("console", [f"python -m sglang.launch_server --model-path {name}"])
    if "transformers" in taken:
        yield "Transformers, with GPTQModel installed:"
        yield ""
        yield from _fence(
            "python",
            [
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                f'model = AutoModelForCausalLM.from_pretrained({facts.name!r}, device_map="auto")',
                f"tokenizer = AutoTokenizer.from_pretrained({facts.name!r})",
            ]
            if facts.pipeline_tag == "text-generation"
            else [
                "from transformers import pipeline",
                "",
                f'pipe = pipeline({facts.pipeline_tag!r}, model={facts.name!r}, device_map="auto")',
            ],
        )
    yield "Without a server, from a directory that holds these files:"
    yield ""
    yield from _fence("console", ["gptq load DIR --prompt 'Once upon a time'"])
    yield from _not_taken(target for target in facts.targets if not target.ok)


def _not_taken(targets: Iterable[TargetReport]) -> Iterator[str]:
    lines = []
    for target in targets:
        error = next(finding for finding in target.findings if finding.level == "error")
        reader = _READERS.get(target.target, target.target)
        lines.append(f"- {text(reader)} does not take it: {text(error.message)}")
    if lines:
        yield from (*lines, "")


def _dense(report: RunReport) -> Iterator[str]:
    lines = [
        f"- {code(one.name)}: {text(one.reason)}, {number_of(one.linears, 'linear')}"
        for one in report.kept_dense
    ]
    lines += [f"- {code(name)}" for name in report.dense_modules]
    yield from lines or ["Nothing."]
    yield ""


def text(value: str) -> str:
    """`value` in Markdown as the words that it is: on one line, no markup, no HTML, no link."""
    return _MARKS.sub(r"\\\1", escape(" ".join(value.split()), quote=False)).replace("://", "&#58;//")


def code(value: str) -> str:
    """`value` as a code span, also inside a table."""
    line = " ".join(value.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {line} {ticks}" if longest else f"`{line}`"


def _fence(language: str, lines: Iterable[str]) -> Iterator[str]:
    shown = [" ".join(line.splitlines()) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    ticks = "`" * max(3, longest + 1)
    yield from (f"{ticks}{language}", *shown, ticks, "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
