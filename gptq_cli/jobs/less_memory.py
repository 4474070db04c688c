"""What to change where a step ran out of memory: options that this step uses, with less than is in use.

An option that is as low as it goes, or that the run has lowered by itself, is not named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from gptq_cli.config import QuantizeJob
from gptq_cli.events import Phase
from gptq_cli.load_job import LoadJob
from gptq_cli.placement.device import CPU
from gptq_cli.placement.device_map import DeviceMap

Command = Literal["quantize", "load", "inspect-map"]
MACHINE = "free memory on this machine, or raise its limit (ulimit -v, the container's)"
PROVED = "the checkpoint is complete: measure it by itself with gptq load, which can spread the model"
ANEW = " --resume never (the work begins anew)"
"""What an option needs that makes another job of a run, where blocks of it are kept."""
_OFFLOAD = "offload blocks (--device-map auto with --max-memory)"
_SEE = "see what needs memory: gptq quantize … --dry-run"
_BATCHED: tuple[Phase, ...] = ("bits", "gradients", "capture", "head", "resume")
"""Forwards of micro-batches run in these."""
_SAMPLED: tuple[Phase, ...] = (*_BATCHED, "calibration", "tune")
"""The size of these grows with the samples."""


def half(number: int, least: int = 1) -> int | None:
    """Half of what is in use, None where it cannot be less."""
    return max(least, number // 2) if number > least else None


def of_quantize(
    job: QuantizeJob, phase: Phase, *, micro_batch: int | None, on_cpu: bool, kept: bool
) -> Iterator[str]:
    """`micro_batch`: samples of a forward, None where that is not known yet. `kept`: blocks are finished, and
    count only for the same text and settings."""
    data, config = job.calibration, job.quantize
    anew = ANEW if kept else ""
    batch = half(micro_batch or data.batch_size or 1)
    if batch is not None and phase in _BATCHED:
        yield f"--batch-size {batch}"
    if phase == "gradients":
        yield f"--fisher-tokens 0{anew}"
    if phase == "tune" and config.tune_epochs:
        yield f"--tune-epochs 0{anew}"
    yield MACHINE if on_cpu or _is_cpu(job.device_map) else _OFFLOAD
    samples = half(data.samples, len(data.sources))
    if samples is not None and phase in _SAMPLED:
        yield f"--samples {samples}{anew}"
    yield _SEE


def of_load(job: LoadJob, phase: Phase, *, on_cpu: bool) -> Iterator[str]:
    """As `of_quantize`."""
    if phase == "generate":
        yield "shorten the prompt"
        if (tokens := half(job.max_new_tokens)) is not None:
            yield f"--max-new-tokens {tokens}"
    if phase == "evaluate" and (tokens := half(job.seq_len, 2)) is not None:
        yield f"--seq-len {tokens}"
    if phase == "dense":
        yield "leave --against out"
    if on_cpu or _is_cpu(job.device_map):
        yield MACHINE
        return
    if job.device_map is None or job.device_map.strategy is None:
        yield "spread the model (--device-map auto)"
    yield "take the CPU (--device-map cpu)"


def _is_cpu(spec: DeviceMap | None) -> bool:
    return spec is not None and set(spec.devices) == {CPU}
