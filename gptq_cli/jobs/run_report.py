"""The result of a run as data: the `RunReport` for report.json, the summary table and `--json`."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Protocol

from gptq_cli import __version__
from gptq_cli.calibration import TokenBatches
from gptq_cli.config import QuantizeJob
from gptq_cli.events import BlockFinished, CacheFlushed, DeviceMemory, Event, Observer, PhaseFinished
from gptq_cli.findings import Finding
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.time import Estimate
from gptq_cli.results.bits import BitChoice
from gptq_cli.results.kept import KeptDense, OwnSettings
from gptq_cli.results.run import (
    BlockReport,
    ExpertsReport,
    LinearReport,
    RankReport,
    RunReport,
    Setting,
    StartReport,
    TuningReport,
)

LIBRARIES = ("torch", "transformers", "accelerate", "safetensors")
"""Those that compute, or decide what is computed."""


@dataclass(slots=True)
class Tally:
    """An observer between the engine and the display that passes every event on and keeps data for the
    report."""

    observer: Observer
    host_peak_bytes: int = 0
    """The peak of the process when the run began: see `devices.host_memory.reset_peak_resident`."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        """Note the event and pass it on."""
        match event:
            case PhaseFinished():
                self.phase_seconds[event.phase] = self.phase_seconds.get(event.phase, 0.0) + event.seconds
            case BlockFinished():
                self.record(event.memory)
            case CacheFlushed():
                self.record(event.before)
            case _:
                pass
        self.observer(event)

    def record(self, readings: Iterable[DeviceMemory]) -> None:
        """Record readings. A process peak that has not risen during this run may be an earlier run's."""
        for entry in readings:
            peak = entry.peak_bytes
            if entry.device == "cpu" and peak <= self.host_peak_bytes:
                peak = entry.allocated_bytes
            self.peak_bytes[entry.device] = max(peak, self.peak_bytes.get(entry.device, 0))


class Kept(Protocol):
    """What outlasts an interruption of a run."""

    @property
    def starts(self) -> tuple[StartReport, ...]:
        """Every start, this one last."""
        ...

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """Those of every start."""
        ...

    @property
    def phase_seconds(self) -> tuple[tuple[str, float], ...]:
        """What keeping took."""
        ...

    @property
    def snapshot_bytes(self) -> int:
        """The largest snapshot."""
        ...


def summarize(
    *,
    job: QuantizeJob,
    skeleton: Skeleton,
    tokens: TokenBatches,
    schedule: Schedule,
    devices: Sequence[str],
    streaming: tuple[str, ...],
    predicted_peak_bytes: Sequence[tuple[str, int]],
    blocks: tuple[BlockReport, ...],
    head: LinearReport | None,
    tuning: TuningReport | None,
    own_settings: tuple[OwnSettings, ...],
    kept_dense: tuple[KeptDense, ...],
    packed_bytes: int,
    size_after_bytes: int,
    findings: tuple[Finding, ...],
    bits: BitChoice | None,
    estimate: Estimate | None,
    tally: Tally,
    kept: Kept,
    settings: tuple[tuple[str, Setting], ...],
    ranks: tuple[RankReport, ...],
) -> RunReport:
    """The report of a finished run. `packed_bytes`: size of all linears' qweight, qzeros, scales and
    g_idx."""
    config, starts = job.quantize, kept.starts  # the last one goes on
    weights = sum(info.in_features * info.out_features for info in skeleton.packed)
    linears = [linear for block in blocks for linear in block.linears] + ([head] if head else [])
    block_seconds = sum(block.seconds for block in blocks)
    peaks = dict(tally.peak_bytes)
    for device, peak in (entry for block in blocks for entry in block.peak_bytes):
        if len(starts) > 1:  # those of earlier starts are known from their blocks
            peaks[device] = max(peak, peaks.get(device, 0))
    return RunReport(
        model=skeleton.files.source,
        revision=skeleton.files.revision,
        out=job.out,
        bits=config.bits,
        group_size=config.group_columns,
        sym=config.sym,
        desc_act=config.desc_act,
        checkpoint_format=config.checkpoint_format,
        bits_per_weight=8 * packed_bytes / max(1, weights),
        bits_per_parameter=8 * size_after_bytes / max(1, skeleton.parameters),
        quantized_share=skeleton.quantized_share,
        own_settings=own_settings,
        kept_dense=kept_dense,
        bit_choice=bits,
        asked_before=job.asked_before,
        dense_modules=tuple(dict.fromkeys(item.name for item in skeleton.dense)),
        size_before_bytes=skeleton.files.size_bytes,
        source_format=skeleton.files.decoded.words if skeleton.files.decoded is not None else "dense",
        size_after_bytes=size_after_bytes,
        dtype=dtype_name(skeleton.dtype),
        use_cuda_fp16=str(skeleton.dtype) == "torch.float16",
        devices=tuple(devices),
        ranks=ranks,
        streaming=streaming,
        predicted_peak_bytes=tuple(predicted_peak_bytes),
        measured_peak_bytes=tuple(peaks.items()),
        samples=tokens.samples,
        seq_len=tokens.seq_len,
        tokens=tokens.tokens,
        dataset_sha256=tokens.sha256,
        calibration_source=tokens.source,
        calibration_texts=tokens.shares,
        seed=job.calibration.seed,
        fallbacks=sum(linear.method != "gptq" for linear in linears),
        experts=ExpertsReport.of(linears),
        findings=findings,
        warnings=kept.all_warnings,
        predicted_seconds=None if estimate is None else estimate.seconds,
        predicted_block_seconds=() if estimate is None else tuple(estimate.block_seconds.items()),
        seconds=sum(start.seconds for start in starts),
        starts=starts,
        snapshot_bytes=kept.snapshot_bytes,
        phase_seconds=(*tally.phase_seconds.items(), ("blocks", block_seconds), *kept.phase_seconds),
        versions=versions(),
        command_line=job.command_line,
        settings=settings,
        schedule=schedule,
        blocks=blocks,
        head=head,
        tuning=tuning,
    )


def versions() -> tuple[tuple[str, str], ...]:
    """Of this program, of Python, and of the libraries that compute."""
    return (
        ("gptq-cli", __version__),
        ("python", platform.python_version()),
        *((name, version(name)) for name in LIBRARIES),
    )
