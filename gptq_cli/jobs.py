"""The story of each command on one screen: open, judge, work, report.

A job comes in as frozen data, events go out through the observer, a report comes back. Everything that can be
known from config.json, the heads of the files and the calibration text is judged before a weight is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptq_cli.calibration import TokenBatches, evaluation_windows, make_batches, open_tokenizer
from gptq_cli.config import InspectJob, LoadJob, QuantizeJob
from gptq_cli.device import CPU, Device
from gptq_cli.devices.accelerators import present_devices, read_memory
from gptq_cli.engine.loop import LoopOptions
from gptq_cli.engine.run import EngineRun, is_out_of_memory, phase, quantize_model
from gptq_cli.engine.summary import Tally, summarize
from gptq_cli.errors import CalibrationError, ModelError, OutOfDeviceMemory
from gptq_cli.events import (
    FindingRaised,
    Observer,
    PhaseAdvanced,
    RunFinished,
    RunStarted,
    ShardWritten,
    Warned,
    ignore,
)
from gptq_cli.findings import PreflightReport
from gptq_cli.inference.generation import generate
from gptq_cli.inference.opening import default_placement, kernel_counts, load_quantized, resident_bytes
from gptq_cli.inference.perplexity import perplexity
from gptq_cli.model.checkpoint import QuantizedCheckpoint
from gptq_cli.model.reader import open_checkpoint
from gptq_cli.model.skeleton import Skeleton, open_skeleton
from gptq_cli.model.source import find_model
from gptq_cli.model.writer import CheckpointWriter
from gptq_cli.placement import DeviceBudget, ModelFacts, Placement
from gptq_cli.preflight import rules_source
from gptq_cli.preflight.budget import micro_batch_tokens, packed_bytes
from gptq_cli.preflight.cases import Work
from gptq_cli.preflight.check import check_quantize
from gptq_cli.preflight.facts import (
    capabilities,
    checkpoint_facts,
    environment_facts,
    model_facts,
    output_facts,
)
from gptq_cli.preflight.probe import estimate_seconds
from gptq_cli.preflight.report import map_report, quantize_plan
from gptq_cli.preflight.resolve import Resolution, refusal, resolve
from gptq_cli.results import LoadReport, MapReport, RunReport, document


def quantize(job: QuantizeJob, observer: Observer = ignore) -> RunReport:
    """Quantize a model and write the checkpoint to `job.out`.

    Raises `UsageError` (nothing was started), `PreflightRefused` (nothing was written), `OutOfDeviceMemory`,
    `QualityGateFailed`. Whatever is raised, no working folder is left. Where something would lie on disk, the
    `PreflightRefused` is a `ValueError` as well.
    """
    started = time.perf_counter()
    tally = Tally(observer)
    judged = _judge(job, tally)
    _announce(judged.findings, tally)
    placement, tokens = judged.resolution.placement, judged.tokens
    if not judged.findings.ok or placement is None or tokens is None:
        raise refusal(judged.findings)
    tally(_header(job, judged, placement, tokens))
    run = EngineRun(
        skeleton=judged.skeleton,
        placement=placement,
        config=job.quantize,
        options=LoopOptions(parked=judged.resolution.parked, strict=job.strict, devices=_watched(placement)),
        batch_size=micro_batch_tokens(judged.work) // tokens.seq_len,
    )
    with _out_of_memory_explained(), _writer(job, judged.skeleton, tally) as writer:
        blocks = quantize_model(run, tokens.input_ids, writer.add_packed, tally)
        with phase(tally, "save"):
            writer.copy_dense()
        report = summarize(
            job=job,
            skeleton=judged.skeleton,
            tokens=tokens,
            devices=[str(device) for device in placement.devices],
            predicted_peak_bytes=[
                (plan.device, plan.predicted_peak_bytes) for plan in judged.resolution.devices
            ],
            blocks=blocks,
            packed_bytes=sum(packed_bytes(linear, job.quantize) for linear in judged.facts.linears),
            size_after_bytes=writer.plan.size_bytes,
            tally=tally,
            seconds=time.perf_counter() - started,
        )
        writer.finish(document(report))
    tally(RunFinished(report))
    return report


def dry_run(job: QuantizeJob, observer: Observer = ignore) -> MapReport:
    """What `quantize` would do with this job, and whether it may; reads no weight and writes nothing."""
    judged = _judge(job, observer)
    return map_report(
        judged.facts,
        judged.resolution,
        spec=job.device_map,
        budgets=judged.budgets,
        max_memory=job.max_memory,
        report=judged.findings,
        given=job.devices is not None,
        plan=quantize_plan(judged.facts, judged.work, _seconds(job, judged)),
    )


def _seconds(job: QuantizeJob, judged: _Judged) -> float | None:
    """An estimate from a short probe of this machine; None where refused or planned for another."""
    resolution = judged.resolution
    if job.devices is not None or not judged.findings.ok or resolution.placement is None:
        return None
    main = resolution.placement.main_device
    return estimate_seconds(judged.facts, judged.work, main, parked=resolution.parked)


def inspect_map(job: InspectJob, observer: Observer = ignore) -> MapReport:
    """Where everything of a model would go, and whether that is allowed; reads no weight."""
    with phase(observer, "open"):
        skeleton = open_skeleton(find_model(job.model, weights=False), job.model)
        facts = model_facts(skeleton)
    budgets, resolution, findings = _placed(job, skeleton, facts)
    return map_report(
        facts,
        resolution,
        spec=job.device_map,
        budgets=budgets,
        max_memory=job.max_memory,
        report=findings,
        given=job.devices is not None,
    )


def load(job: LoadJob, observer: Observer = ignore) -> LoadReport:
    """Open a quantized checkpoint, put it where it belongs, and prove that it works.

    Raises `CheckpointError` naming the tensor that is missing, truncated or inconsistent, and
    `PreflightRefused` when the device map is not legal or the checkpoint does not fit.
    """
    with phase(observer, "open"):
        checkpoint = open_checkpoint(job.path, trust_remote_code=job.trust_remote_code, dtype=job.dtype)
        placement = _load_placement(job, checkpoint, observer)
        windows = _evaluation_text(job, checkpoint)
    for note in checkpoint.notes:
        observer(Warned(note))
    started = time.perf_counter()
    with _out_of_memory_explained(), phase(observer, "load", len(checkpoint.linears)):
        model = load_quantized(
            checkpoint, placement, on_linear=lambda done, total: observer(PhaseAdvanced("load", done, total))
        )
    load_seconds = time.perf_counter() - started
    memory = read_memory(_watched(placement))
    report = LoadReport(
        path=job.path,
        quantizer=checkpoint.quantizer,
        bits=checkpoint.bits,
        group_size=checkpoint.group_size,
        sym=checkpoint.sym,
        desc_act=checkpoint.desc_act,
        checkpoint_format=checkpoint.checkpoint_format,
        linears=len(checkpoint.linears) + len(checkpoint.experts),
        device_map=", ".join(str(device) for device in placement.devices),
        device_reason=placement.reason,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        use_cuda_fp16=str(checkpoint.dtype) == "torch.float16",
        kernels=kernel_counts(model),
        load_seconds=load_seconds,
        weight_bytes=resident_bytes(model),
        memory=tuple((entry.device, entry.allocated_bytes) for entry in memory),
    )
    return _proven(job, checkpoint, model, windows, report, observer)


def open_model(job: LoadJob, observer: Observer = ignore) -> Any:
    """The Transformers model of a quantized checkpoint, ready for `generate`; raises what `load` raises."""
    checkpoint = open_checkpoint(job.path, trust_remote_code=job.trust_remote_code, dtype=job.dtype)
    placement = _load_placement(job, checkpoint, observer)
    with _out_of_memory_explained():
        return load_quantized(checkpoint, placement)


def _load_placement(job: LoadJob, checkpoint: QuantizedCheckpoint, observer: Observer) -> Placement:
    if job.device_map is None:
        return default_placement(checkpoint)
    resolution = resolve(
        job.device_map, checkpoint_facts(checkpoint), present_devices(), environment=environment_facts()
    )
    _announce(resolution.report, observer)
    if not resolution.report.ok or resolution.placement is None:
        raise refusal(resolution.report)
    return resolution.placement


def _evaluation_text(job: LoadJob, checkpoint: QuantizedCheckpoint) -> TokenBatches | None:
    """The windows of --eval; cut before the weights are read, so that a bad file costs nothing."""
    if job.evaluate is None:
        return None
    tokenizer = open_tokenizer(checkpoint.directory, job.trust_remote_code)
    return evaluation_windows(tokenizer, job.evaluate, job.seq_len, job.windows)


def _proven(
    job: LoadJob,
    checkpoint: QuantizedCheckpoint,
    model: object,
    windows: TokenBatches | None,
    report: LoadReport,
    observer: Observer,
) -> LoadReport:
    """The report with what --prompt and --eval add."""
    if job.prompt is not None:
        tokenizer = open_tokenizer(checkpoint.directory, job.trust_remote_code)
        with phase(observer, "generate", job.max_new_tokens):
            made = generate(model, tokenizer, job.prompt, job.max_new_tokens)
        report = replace(
            report,
            prompt=job.prompt,
            text=made.text,
            new_tokens=made.new_tokens,
            tokens_per_second=made.tokens_per_second,
        )
    if windows is not None:
        with phase(observer, "evaluate", windows.samples):
            measured = perplexity(
                model,
                windows.input_ids,
                lambda done, total: observer(PhaseAdvanced("evaluate", done, total)),
            )
        report = replace(report, perplexity=measured.value, windows=measured.windows, seq_len=windows.seq_len)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """A job after preflight: everything the engine needs, and everything that was found."""

    skeleton: Skeleton
    facts: ModelFacts
    work: Work
    budgets: tuple[DeviceBudget, ...]
    tokens: TokenBatches | None
    resolution: Resolution
    findings: PreflightReport


def _judge(job: QuantizeJob, observer: Observer) -> _Judged:
    """Open the heads of the files, cut the calibration text, resolve the map, and collect every finding."""
    with phase(observer, "open"):
        skeleton = open_skeleton(find_model(job.model), job.model)
        facts = model_facts(skeleton)
    with phase(observer, "calibration") as words:
        tokens, text_findings = _tokens(job, skeleton, facts)
        if tokens is not None:
            words.append(f"{tokens.samples} x {tokens.seq_len} tokens of {tokens.source}")
    budgets, resolution, findings = _placed(job, skeleton, facts)
    return _Judged(
        skeleton=skeleton,
        facts=facts,
        work=Work(job.quantize, job.calibration),
        budgets=budgets,
        tokens=tokens,
        resolution=resolution,
        findings=text_findings + findings,
    )


def _placed(
    job: QuantizeJob | InspectJob, skeleton: Skeleton, facts: ModelFacts
) -> tuple[tuple[DeviceBudget, ...], Resolution, PreflightReport]:
    """The devices, the map resolved on them, and the findings about both and about the job."""
    work = Work(job.quantize, job.calibration)
    budgets = job.devices or present_devices()
    resolution = resolve(
        job.device_map,
        facts,
        budgets,
        max_memory=job.max_memory,
        work=work,
        environment=environment_facts(),
        given=job.devices is not None,
    )
    devices = resolution.placement.devices if resolution.placement else ()
    output = output_facts(job.out, skeleton.files.directory) if isinstance(job, QuantizeJob) else None
    findings = check_quantize(
        facts,
        work,
        problems=skeleton.problems,
        output=output,
        overwrite=isinstance(job, QuantizeJob) and job.overwrite,
        devices=devices,
        capabilities=() if job.devices else capabilities(devices),
    )
    return budgets, resolution, resolution.report + findings


def _tokens(
    job: QuantizeJob, skeleton: Skeleton, facts: ModelFacts
) -> tuple[TokenBatches | None, PreflightReport]:
    """The calibration windows, or a finding that says why there are none."""
    try:
        tokenizer = open_tokenizer(skeleton.files.directory, job.model.trust_remote_code)
        tokens = make_batches(tokenizer, job.calibration, vocab_size=facts.vocab_size or None)
        return tokens, PreflightReport()
    except (CalibrationError, ModelError) as error:
        hint = error.hint or ""
        if isinstance(error, CalibrationError):
            found = rules_source.calibration_text(job.calibration.source, error.message, hint)
        else:
            found = rules_source.tokenizer(job.model.model, error.message, hint)
        return None, PreflightReport(tuple(found))


def _announce(report: PreflightReport, observer: Observer) -> None:
    for finding in report.ordered():
        observer(FindingRaised(finding))


def _watched(placement: Placement) -> tuple[Device, ...]:
    """The devices whose memory is shown: those of the placement, and the CPU, which always does something."""
    return tuple(dict.fromkeys((*placement.devices, CPU)))


def _header(job: QuantizeJob, judged: _Judged, placement: Placement, tokens: TokenBatches) -> RunStarted:
    config = job.quantize
    zeros = "symmetric" if config.sym else "asymmetric"
    forwards = "parked, each linear runs once" if judged.resolution.parked else "replayed, to save memory"
    return RunStarted(
        command="quantize",
        model=job.model.model,
        out=job.out,
        settings=(
            ("bits", f"{config.bits}, group {config.group_size}, {zeros}"),
            ("order", "desc_act" if config.desc_act else config.act_order),
            ("dtype", judged.facts.dtype),
            ("calibration", f"{tokens.samples} x {tokens.seq_len} tokens of {tokens.source}"),
            ("placement", placement.reason),
            ("forwards", forwards),
        ),
        devices=tuple(str(device) for device in placement.devices),
        blocks=len(judged.skeleton.blocks),
        linears=len(judged.skeleton.linears),
    )


def _writer(job: QuantizeJob, skeleton: Skeleton, observer: Observer) -> CheckpointWriter:
    return CheckpointWriter(
        Path(job.out),
        skeleton,
        job.quantize,
        max_shard_bytes=job.max_shard_bytes,
        overwrite=job.overwrite,
        on_shard=lambda path, size, tensors: observer(ShardWritten(path.name, size, tensors)),
    )


@contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    """Turn an allocator's error into exit code 4 and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfDeviceMemory(
            f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="lower --batch-size or --samples, offload blocks (--device-map auto with --max-memory), "
            "or see what needs how much: gptq quantize … --dry-run",
        ) from error
