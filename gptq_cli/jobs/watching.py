"""What surrounds the steps of a command: warnings are kept, and an out-of-memory error says where it
happened.

    with watching("quantize", observer) as watcher:
        …                                  # report to `watcher`; it passes every event on
    watcher.warnings                       # every warning that was given, for the report

Every warning takes the same way, whether from a preflight rule, the engine, or a library through Python's
`warnings`: it is an event, so each display shows it, and it is kept for the report. An out-of-memory error in
any step becomes an `OutOfDeviceMemory` that names the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TextIO

from gptq_cli.config import QuantizeJob
from gptq_cli.devices.out_of_memory import out_of_memory_told
from gptq_cli.errors import OutOfDeviceMemory
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    Event,
    Observer,
    Phase,
    PhaseFinished,
    PhaseStarted,
    Warned,
    ignore,
    warning_text,
)
from gptq_cli.jobs.less_memory import MACHINE, PROVED, Command, of_load, of_quantize
from gptq_cli.load_job import LoadJob
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule

_PROOF: tuple[Phase, ...] = ("open", "load", "generate", "bench", "dense", "evaluate", "tasks")
_OF_FILES: tuple[Phase, ...] = ("startup", "download", "open", "save", "verify", "upload")
"""No option makes these smaller."""
_PHASES: dict[Phase, str] = {
    "startup": "starting",
    "download": "downloading the model",
    "open": "opening the model",
    "calibration": "reading the calibration text",
    "write": "letting the model write its calibration text",
    "bits": "measuring what fewer bits cost",
    "load": "loading the weights",
    "capture": "capturing what enters the blocks",
    "head": "quantizing the output head",
    "gradients": "taking gradients of the dense model",
    "tune": "tuning scales, norms and biases",
    "resume": "going on after the finished blocks",
    "save": "writing the tensors that stay dense",
    "verify": "verifying the files",
    "generate": "generating text",
    "bench": "measuring speed",
    "dense": "loading the dense model",
    "evaluate": "evaluating",
    "tasks": "scoring tasks",
    "upload": "uploading",
}


@dataclass(slots=True)
class Watcher:
    """An observer that passes every event on, keeps warnings and notes the current step."""

    observer: Observer
    doing: str = "while starting"
    warnings: list[str] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    """Those that were started, the current one last."""
    job: QuantizeJob | LoadJob | None = None
    """What was asked for; None where no option decides how much memory is needed."""
    micro_batch: int | None = None
    """Samples of a forward that runs out of memory; None before that is known."""
    on_cpu: bool = False
    """The CPU does all the work."""
    keeps: bool = True
    """Finished blocks are kept; a trial throws them away."""
    kept: bool = False
    """Blocks are finished, and kept."""

    def planned(self, placement: Placement, schedule: Schedule | None = None, ranks: int = 1) -> None:
        """Note where the work will be done, and how much of the text at a time."""
        self.on_cpu = set(placement.devices) == {CPU}
        if schedule is not None:  # alone, the engine gives up only once it has tried one sample at a time
            self.micro_batch = schedule.micro_batch_samples if ranks > 1 else 1

    def __call__(self, event: Event) -> None:
        """Note the event and pass it on."""
        warning = warning_text(event)
        if warning is not None:
            self.warnings.append(warning)
        match event:
            case PhaseStarted(phase):
                self.doing = f"while {_PHASES[phase]}"
                self.phases.append(phase)
            case PhaseFinished(phase):
                self.doing = f"after {_PHASES[phase]}"
            case BlockStarted():
                where = f"{event.name} ({event.index + 1}/{event.total}) on {event.device}"
                self.doing = f"while quantizing block {where}"
            case BlockFinished():
                self.doing = f"after quantizing block {event.report.name}"
                self.kept = self.keeps
            case _:
                pass
        self.observer(event)


def less_memory(command: Command, watcher: Watcher) -> str:
    """What to change so that the current step needs less memory: only what that step uses."""
    phase = watcher.phases[-1] if watcher.phases else "startup"
    if command == "quantize" and phase in _PROOF and "save" in watcher.phases:
        return PROVED
    if command == "inspect-map" and phase != "startup":
        return f"no weight is read here: {MACHINE}"
    job = watcher.job
    if job is None or phase in _OF_FILES:
        return MACHINE
    if isinstance(job, LoadJob):
        return "; or ".join(of_load(job, phase, on_cpu=watcher.on_cpu))
    found = of_quantize(job, phase, micro_batch=watcher.micro_batch, on_cpu=watcher.on_cpu, kept=watcher.kept)
    return "; or ".join(found)


def out_of_memory_in(doing: str) -> AbstractContextManager[None]:
    """What raises `OutOfDeviceMemory` for a step outside of `watching`, such as one before torch is there."""
    return out_of_memory_told(lambda: doing, MACHINE)


def out_of_memory_while(watcher: Watcher, command: Command) -> AbstractContextManager[None]:
    """What raises `OutOfDeviceMemory` for a part of what is watched, for those who add to its hint."""
    return out_of_memory_told(lambda: watcher.doing, lambda: less_memory(command, watcher))


@contextmanager
def watching(
    command: Command, observer: Observer, job: QuantizeJob | LoadJob | None = None
) -> Iterator[Watcher]:
    """Yield the observer for the steps of `command`. Raises `OutOfDeviceMemory`, exit code 4."""
    watcher = Watcher(observer, job=job)
    reported = nullcontext() if observer is ignore else _python_warnings_as_events(watcher)
    try:
        with out_of_memory_while(watcher, command), reported:
            yield watcher
    except OutOfDeviceMemory:
        from gptq_cli.devices.accelerators import flush

        flush(())  # the command's memory is free now: leave the devices as they were before
        raise


@contextmanager
def _python_warnings_as_events(observer: Observer) -> Iterator[None]:
    """Turn the warnings of libraries into events, instead of text on stderr; the same one once."""
    told: set[str] = set()

    def report(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = f"{category.__name__}: {' '.join(str(message).split())}"
        if text not in told:
            told.add(text)
            observer(Warned(text))

    with warnings.catch_warnings():
        warnings.showwarning = report
        yield
