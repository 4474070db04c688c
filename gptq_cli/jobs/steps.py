"""Steps that several commands take: place and judge, announce what was found, explain a lack of memory."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from gptq_cli.config import InspectJob, QuantizeJob
from gptq_cli.device import CPU, Device
from gptq_cli.devices.accelerators import flush, is_out_of_memory, present_devices
from gptq_cli.errors import OutOfDeviceMemory
from gptq_cli.events import FindingRaised, Observer
from gptq_cli.findings import PreflightReport
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.placement import DeviceBudget, ModelFacts, Placement
from gptq_cli.preflight.cases import Work
from gptq_cli.preflight.check import check_quantize
from gptq_cli.preflight.facts import capabilities, environment_facts, output_facts
from gptq_cli.preflight.resolve import Resolution, resolve

_LESS_MEMORY = {
    "quantize": "lower --batch-size or --samples, offload blocks (--device-map auto with --max-memory), "
    "or see what needs how much: gptq quantize … --dry-run",
    "load": "lower --seq-len, spread the model (--device-map auto), or leave --against out",
}


def placed(
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
        targets=job.targets,
    )
    return budgets, resolution, resolution.report + findings


def announce(report: PreflightReport, observer: Observer) -> None:
    for finding in report.ordered():
        observer(FindingRaised(finding))


def watched(placement: Placement) -> tuple[Device, ...]:
    """The devices whose memory is shown: those of the placement, and the CPU, which always does something."""
    return tuple(dict.fromkeys((*placement.devices, CPU)))


@contextmanager
def out_of_memory_explained(command: Literal["quantize", "load"]) -> Iterator[None]:
    """Turn an allocator's error into exit code 4 and what to change.

    The error's traceback forgets the variables of its functions, so that whoever keeps the error does not
    keep the model; then the devices are flushed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _forget_variables(error)
        flush(())
        raise OutOfDeviceMemory(
            f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint=_LESS_MEMORY[command],
        ) from error


def _forget_variables(error: BaseException) -> None:
    """Clear the finished functions in the tracebacks of `error` and of what it came from."""
    chained: BaseException | None = error
    while chained is not None:
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__ or chained.__context__
