"""`gptq report`: what earlier runs left behind, read back. No weight is read, and torch is not needed.

A run is known from its report.json. What `gptq load --json` printed is read as well; of a checkpoint that has
no report, as other tools write them, the quantization config and the sizes of the files say a little.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gptq_cli.checkpoint.configs import checkpoint_directory, read_formats
from gptq_cli.errors import CheckpointError, ConfigError
from gptq_cli.files import kind_of, open_once, reason, shown
from gptq_cli.results.comparison import Compared, Comparison
from gptq_cli.results.document import Json
from gptq_cli.results.load import LoadReport, VerifyReport
from gptq_cli.results.reading import read_document
from gptq_cli.results.run import RunReport, Setting, finite_mean

Report = RunReport | LoadReport | VerifyReport
FILE = "report.json"
_NO_DIFFERENCE = frozenset(
    {"model", "out", "card", "eval", "against_source", "max_kl", "max_perplexity", "bench"}
    | {"tasks", "task_dir", "task_limit", "shots", "min_score", "dtype"}
)
"""Settings that say where a result lies, and what was measured of it, but not how it was made. The dtype is
taken from the result."""
_LARGEST_BYTES = 1 << 30
_KINDS: tuple[tuple[str, type[Report]], ...] = (
    ("dataset_sha256", RunReport),
    ("kernels", LoadReport),
    ("checks", VerifyReport),
)
"""A field that only a document of this kind has."""


def report_of(path: str) -> Report | Comparison:
    """What is known of one checkpoint: its report, or where it has none, what its config says.

    `path`: a directory, or a JSON document. Raises `CheckpointError`.
    """
    return _report(path) or Comparison(runs=(_from_config(path),))


def compare(paths: Sequence[str]) -> Comparison:
    """Several checkpoints side by side. Raises `CheckpointError`, and `ConfigError` for one named twice."""
    known: dict[str, str] = {}
    for path in paths:
        report = os.path.join(path, FILE)
        real = os.path.realpath(report if os.path.exists(report) else path)
        if real in known:
            raise ConfigError(f"{shown(path)} is named twice", hint="name two different runs")
        known[real] = path
    return Comparison(runs=tuple(map(compared, paths)))


def compared(path: str) -> Compared:
    """One checkpoint of a comparison."""
    report = _report(path)
    match report:
        case RunReport():
            return _of_run(path, report)
        case LoadReport():
            return _of_load(path, report)
        case None:
            return _from_config(path)
        case _:
            raise CheckpointError(
                f"{shown(path)} is the document of gptq load --verify, which has no figures to compare",
                hint="compare directories of checkpoints, or documents of gptq load --eval --json",
            )


def _report(path: str) -> Report | None:
    """The document at `path` or in the directory `path`; None where the directory has none."""
    file = Path(path)
    try:
        if not path or kind_of(file) not in ("file", "pipe"):
            file = checkpoint_directory(path) / FILE
            if kind_of(file) is None:
                return None
        with open_once(file) as stream:
            raw = stream.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{shown(file)} cannot be read: {reason(error)}") from error
    if len(raw) > _LARGEST_BYTES:
        raise CheckpointError(f"{shown(file)} has more than {_LARGEST_BYTES} bytes, which is the limit")
    try:
        held: Json = json.loads(raw)
        return read_document(_kind(held), held)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{shown(file)} is not a report that can be read: {why}",
            hint="it may be damaged, or of another version of gptq",
        ) from error


def _kind(held: Json) -> type[Report]:
    if not isinstance(held, dict):
        raise ValueError("it is not a JSON object")
    failed = held.get("error")
    if isinstance(failed, dict):
        raise ValueError(f"the command that wrote it failed: {failed.get('message')}")
    for field, kind in _KINDS:
        if field in held:
            return kind
    raise ValueError("it is neither a report.json nor what gptq load --json prints")


def _of_run(path: str, report: RunReport) -> Compared:
    known = Compared(
        path=path,
        origin="report.json",
        model=report.model,
        settings=tuple(_settings(report)),
        size_bytes=report.size_after_bytes,
        size_before_bytes=report.size_before_bytes,
        bits_per_weight=report.bits_per_weight,
        bits_per_parameter=report.bits_per_parameter,
        loss=report.mean_loss,
        rtn_loss=report.mean_rtn_loss,
        fallbacks=report.fallbacks,
        block_losses=tuple((b.name, finite_mean(x.loss for x in b.linears)) for b in report.blocks),
        seconds=report.seconds,
        peak_bytes=report.measured_peak_bytes,
        warnings=len(report.warnings),
    )
    return _with_measured(known, report.proof)


def _settings(report: RunReport) -> Iterator[tuple[str, Setting]]:
    yield from ((name, value) for name, value in report.settings if name not in _NO_DIFFERENCE)
    yield "format", report.checkpoint_format
    yield "dtype", report.dtype
    yield "source", report.source_format
    yield "calibration sha256", report.dataset_sha256[:12]
    yield "device", ", ".join(report.devices)
    yield from report.versions


def _of_load(path: str, report: LoadReport) -> Compared:
    settings: tuple[tuple[str, Setting], ...] = (
        ("bits", report.bits),
        ("group_size", report.group_size),
        ("sym", report.sym),
        ("desc_act", report.desc_act),
        ("format", report.checkpoint_format),
    )
    known = Compared(
        path=path,
        origin="load --json",
        settings=settings,
        peak_bytes=report.memory,
        warnings=len(report.warnings),
    )
    return _with_measured(known, report)


def _with_measured(run: Compared, report: LoadReport | None) -> Compared:
    """The same with what `gptq load` measured of it."""
    if report is None:
        return run
    held, bench = report.agreement, report.bench
    text = f"{report.text_source} ({report.windows} x {report.seq_len})"
    return replace(
        run,
        perplexity=report.perplexity,
        measured_on=None if report.perplexity is None else text,
        kl=None if held is None else held.kl,
        top1=None if held is None else held.top1,
        dense_perplexity=None if held is None else held.dense_perplexity,
        tasks=report.tasks,
        prompt_rate=None if bench is None else bench.speed.prompt.tokens_per_second,
        decode_rate=None if bench is None else bench.speed.decode.tokens_per_second,
    )


def _from_config(path: str) -> Compared:
    directory = checkpoint_directory(path)
    raw, known = read_formats(directory)
    base = known.base
    settings: list[tuple[str, Setting]] = [
        ("bits", base.bits),
        ("group_size", base.group_size),
        ("sym", base.sym),
        ("desc_act", base.desc_act),
        ("format", base.checkpoint_format),
    ]
    for name in ("damp_percent", "true_sequential"):
        if isinstance(raw.get(name), (bool, int, float)):
            settings.append((name, raw[name]))
    if known.quantizer:
        settings.append(("written by", known.quantizer))
    try:
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    except OSError as error:
        raise CheckpointError(f"{shown(directory)} cannot be read: {reason(error)}") from error
    return Compared(path=path, origin="config", settings=tuple(settings), size_bytes=size)
