"""The story of `gptq load`: open, judge, put in place, prove."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from gptq_cli.calibration import TokenBatches, evaluation_windows, open_tokenizer
from gptq_cli.config import LoadJob
from gptq_cli.devices.accelerators import present_devices, read_memory
from gptq_cli.engine.run import phase
from gptq_cli.events import Observer, PhaseAdvanced, Warned, ignore
from gptq_cli.inference.generation import generate
from gptq_cli.inference.opening import default_placement, kernel_counts, load_quantized, resident_bytes
from gptq_cli.inference.perplexity import perplexity
from gptq_cli.jobs.steps import announce, out_of_memory_explained, watched
from gptq_cli.model.checkpoint import QuantizedCheckpoint
from gptq_cli.model.reader import open_checkpoint
from gptq_cli.placement import Placement
from gptq_cli.preflight.facts import checkpoint_facts, environment_facts
from gptq_cli.preflight.resolve import refusal, resolve
from gptq_cli.results import LoadReport


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
    with out_of_memory_explained(), phase(observer, "load", len(checkpoint.linears)):
        model = load_quantized(
            checkpoint, placement, on_linear=lambda done, total: observer(PhaseAdvanced("load", done, total))
        )
    load_seconds = time.perf_counter() - started
    memory = read_memory(watched(placement))
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
    with out_of_memory_explained():
        return load_quantized(checkpoint, placement)


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
