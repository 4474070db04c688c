"""The steps of `gptq load`: check the files, open, place, measure.

Everything that follows from headers, configs and texts is checked before a weight is read: the map, the text
to measure on, whether the dense model fits beside the quantized one and can be compared with it at all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from gptq_cli.calibration import TokenBatches, evaluation_windows, open_tokenizer
from gptq_cli.calibration.batches import own_windows
from gptq_cli.calibration.own_text import Wanted
from gptq_cli.checkpoint.checkpoint import QuantizedCheckpoint
from gptq_cli.checkpoint.describe import checkpoint_facts
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.checkpoint.verify import check_targets, verify_checkpoint
from gptq_cli.devices.accelerators import flush, present_devices, read_memory
from gptq_cli.evaluation.tasks import Tasks, open_tasks
from gptq_cli.events import FindingRaised, Observer, PhaseAdvanced, Warned, ignore, phase
from gptq_cli.inference.load import (
    compile_forward,
    default_placement,
    kernel_counts,
    load_quantized,
    resident_bytes,
)
from gptq_cli.jobs.evaluating import (
    DensePlan,
    apply_gates,
    generated,
    measured,
    plan_dense,
    scorer_of,
    timed,
)
from gptq_cli.jobs.steps import announce, watched
from gptq_cli.jobs.texts import check_answers, check_prompt, check_windows
from gptq_cli.jobs.watching import Watcher, watching
from gptq_cli.jobs.writing import check_can_write, evaluation_wanted, text_store
from gptq_cli.load_job import LoadJob
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.positions import Positions, positions_of
from gptq_cli.model.text_part import language_model
from gptq_cli.placement.placement import Placement
from gptq_cli.preflight.facts import environment_facts
from gptq_cli.preflight.resolve import refusal, resolve
from gptq_cli.results.load import LoadReport, VerifyReport
from gptq_cli.text_sources import OWN_TEXT


def load(job: LoadJob, observer: Observer = ignore) -> LoadReport | VerifyReport:
    """Open a quantized checkpoint, place it on its devices, and show that it works.

    Where only --verify and --target are given, or verification finds the files unsound, nothing is opened and
    the `VerifyReport` is returned. A failed gate is data: see `ok`.

    Raises `CheckpointError` naming the tensor that is missing, truncated or inconsistent, and
    `PreflightRefused` when the device map is not legal or a model does not fit.
    """
    with watching("load", observer, job) as watcher:
        report = _load(job, watcher)
        return replace(report, warnings=tuple(watcher.warnings))


def _load(job: LoadJob, observer: Watcher) -> LoadReport | VerifyReport:
    verification = _verified(job, observer)
    if verification is not None and not (job.opens and verification.sound):
        return verification
    with phase(observer, "open"):
        plan = _plan(job, observer)
    observer.planned(plan.placement)
    for warning in (*map(Warned, plan.checkpoint.notes), *plan.warnings):
        observer(warning)
    model, report = _opened(job, plan, verification, observer)
    text = language_model(model)
    if job.prompt is not None:
        report = generated(job, text, plan.tokenizer, report, observer)
    if job.bench:
        report = timed(text, plan.placement, report, plan.positions, observer)
    scorer = scorer_of(plan.tokenizer, plan.tasks, plan.positions, observer)
    report = replace(report, tasks=scorer(text))
    if plan.windows is not None:
        report = measured(text, plan.windows, plan.dense, report, plan.positions, observer, scorer)
    report = replace(report, kernels=kernel_counts(model))  # an operator may have failed meanwhile
    accelerated = plan.placement.main_device.is_accelerator
    del model, text, plan
    if accelerated:
        flush(())  # hooks make reference cycles, which only a collection frees
    return apply_gates(job, report)


def open_model(job: LoadJob, observer: Observer = ignore) -> Any:
    """The Transformers model of a quantized checkpoint, ready for `generate`; raises what `load` raises.

    What the user should know about how it was read is a `Warned` event.
    """
    with watching("load", observer, job) as watcher:
        with phase(watcher, "open"):
            checkpoint = open_checkpoint(job.path, trust_remote_code=job.trust_remote_code, dtype=job.dtype)
            placement = _load_placement(job, checkpoint, watcher)
        watcher.planned(placement)
        for note in checkpoint.notes:
            watcher(Warned(note))
        with phase(watcher, "load"):
            return load_quantized(
                checkpoint, placement, kernel_choice=job.kernel, on_note=lambda text: watcher(Warned(text))
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Everything that is decided before a weight is read."""

    checkpoint: QuantizedCheckpoint
    placement: Placement
    positions: Positions | None
    """Tokens that the model can process at once; None where nothing limits them."""
    tokenizer: Any
    """None where no text is needed."""
    windows: TokenBatches | Wanted | None
    """`Wanted`: what the dense model is to write first."""
    tasks: Tasks | None
    dense: DensePlan | None
    warnings: tuple[Warned, ...]
    """About the texts; about the checkpoint: its `notes`."""


def _verified(job: LoadJob, observer: Observer) -> VerifyReport | None:
    """The result of --verify and --target; their warnings are reported like any other."""
    report = _verification(job, observer)
    if report is not None:
        found = (*report.findings, *(finding for target in report.targets for finding in target.findings))
        for finding in found:
            if finding.level == "warning":
                observer(FindingRaised(finding))
    return report


def _verification(job: LoadJob, observer: Observer) -> VerifyReport | None:
    if job.verify:
        with phase(observer, "verify"):
            return verify_checkpoint(
                job.path,
                targets=job.targets,
                tp=job.tp,
                trust_remote_code=job.trust_remote_code,
                on_tensor=lambda done, total: observer(PhaseAdvanced("verify", done, total)),
            )
    if job.targets:
        with phase(observer, "verify"):
            return check_targets(job.path, job.targets, tp=job.tp, trust_remote_code=job.trust_remote_code)
    return None


def _plan(job: LoadJob, observer: Observer) -> _Plan:
    checkpoint = open_checkpoint(job.path, trust_remote_code=job.trust_remote_code, dtype=job.dtype)
    placement = _load_placement(job, checkpoint, observer)
    positions = positions_of(checkpoint.model, checkpoint.config)
    vocabulary = language_model(checkpoint.model).get_input_embeddings().num_embeddings
    warnings = [] if job.text is None else check_windows(job.seq_len, positions)
    tokenizer = None
    windows: TokenBatches | Wanted | None = None
    if job.prompt is not None or job.text is not None or job.tasks is not None:
        tokenizer = open_tokenizer(checkpoint.directory, job.trust_remote_code)
    if job.prompt is not None:
        warnings += check_prompt(job, job.prompt, checkpoint, tokenizer, positions)
    if job.text is not None and job.text != OWN_TEXT:
        windows = evaluation_windows(tokenizer, job.text, job.seq_len, job.windows, vocab_size=vocabulary)
        warnings += check_answers(windows)
    dense = plan_dense(job, checkpoint, placement, observer)
    if job.text == OWN_TEXT and dense is not None:
        windows = _own_windows(job, dense, vocabulary, observer)
    return _Plan(
        checkpoint=checkpoint,
        placement=placement,
        positions=positions,
        tokenizer=tokenizer,
        windows=windows,
        tasks=None if job.tasks is None else open_tasks(job.tasks),
        dense=dense,
        warnings=tuple(warnings),
    )


def _own_windows(
    job: LoadJob, dense: DensePlan, vocabulary: int, observer: Observer
) -> TokenBatches | Wanted:
    """What the dense model wrote, or what it is to write. Raises `CalibrationError` where it cannot."""
    check_can_write(dense.skeleton, dense.tokenizer(), held_out=True)
    wanted = evaluation_wanted(dense.skeleton, job)
    own = text_store(observer).find(wanted)
    return wanted if own is None else own_windows(own, vocabulary)


def _load_placement(job: LoadJob, checkpoint: QuantizedCheckpoint, observer: Observer) -> Placement:
    if job.device_map is None:
        return default_placement(checkpoint)
    resolution = resolve(
        job.device_map, checkpoint_facts(checkpoint), present_devices(), environment=environment_facts()
    )
    announce(resolution.report, observer)
    if not resolution.report.ok or resolution.placement is None:
        raise refusal(resolution.report)
    return resolution.placement


def _opened(
    job: LoadJob, plan: _Plan, verification: VerifyReport | None, observer: Observer
) -> tuple[Any, LoadReport]:
    """The model on its devices, and a report of how it was loaded."""
    checkpoint, placement = plan.checkpoint, plan.placement
    started = time.perf_counter()
    with phase(observer, "load", len(checkpoint.linears) + len(checkpoint.experts)):
        model = load_quantized(
            checkpoint,
            placement,
            kernel_choice=job.kernel,
            on_linear=lambda done, total: observer(PhaseAdvanced("load", done, total)),
            on_note=lambda text: observer(Warned(text)),
        )
    load_seconds = time.perf_counter() - started
    memory = read_memory(watched(placement))
    if job.compile:
        compile_forward(model)
    return model, LoadReport(
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
        dtype=dtype_name(checkpoint.dtype),
        use_cuda_fp16=str(checkpoint.dtype) == "torch.float16",
        kernels=kernel_counts(model),
        load_seconds=load_seconds,
        weight_bytes=resident_bytes(model),
        memory=tuple((entry.device, entry.allocated_bytes) for entry in memory),
        compiled=job.compile,
        verification=verification,
    )
