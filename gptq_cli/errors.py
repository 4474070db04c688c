"""Every error that `gptq` raises on purpose, and the exit code each one means.

    GptqError                      1   failed: the environment, or a defect of ours
     ├─ UsageError                 2   usage or configuration: nothing was started
     │   ├─ ConfigError                a field of a configuration, a flag or a preset
     │   ├─ DeviceMapError             a device-map or max-memory text that does not parse
     │   ├─ ModelError                 a model that cannot be found, or is not a causal language model
     │   ├─ CalibrationError           a calibration source that cannot be read or is too short
     │   ├─ DestinationBusy            another run writes to the same destination
     │   └─ CheckpointError            a quantized checkpoint that is missing, truncated or inconsistent
     ├─ PreflightRefused           3   the facts forbid the job: nothing was written
     │   └─ DiskOffloadRefused         … because something would lie on disk; a ValueError as well
     ├─ SourceChanged              1   a file of the model changed while the run worked: nothing was written
     ├─ RankLost                   1   a process that worked along is gone; finished blocks are kept
     ├─ OutOfDeviceMemory          4   a device ran out of memory; finished blocks are kept
     └─ QualityGateFailed          5   non-finite numbers, --strict, a limit or a check that failed
         ├─ NonFinite
         │   └─ WeightTooLarge
         ├─ NotPositiveDefinite
         └─ LinearLost

An interruption (SIGINT, SIGTERM) is exit 130; it is a KeyboardInterrupt, not a GptqError: `Interrupted` where
finished blocks or gradients were kept.

What a run of `gptq quantize` finished before an error of exit 1, 4, 5 or 130 is kept, and the same command
run again goes on, unless the error is about the model itself (`SourceChanged`, `NonFinite`).

A message says what is wrong with what, the value found and the values allowed; `hint` says what to
do next. Only `gptq_cli.cli.app.main` turns an error into an exit code.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from gptq_cli.wording import number_of

if TYPE_CHECKING:
    from gptq_cli.findings import PreflightReport


class GptqError(Exception):
    """The run started and failed."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(GptqError):
    """The request itself is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration field has a value that is not allowed."""


class DeviceMapError(UsageError):
    """A device-map, device or max-memory text does not parse; `position` is the character that is wrong."""

    def __init__(self, message: str, *, hint: str | None = None, position: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.position = position


class ModelError(UsageError):
    """The model cannot be found, or this tool cannot quantize it."""


class CalibrationError(UsageError):
    """The calibration source cannot be read or holds too little text."""


class DestinationBusy(UsageError):  # noqa: N818 - later it works
    """Another run writes to the same destination."""


class CheckpointError(UsageError):
    """A quantized checkpoint is missing, truncated or inconsistent; `problems` lists all that was found."""

    def __init__(self, message: str, *, hint: str | None = None, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = problems or (message,)


class PreflightRefused(GptqError):  # noqa: N818 - it is a decision, not a defect
    """Preflight found at least one error. Nothing was written.

    `report` holds all findings; as text the error lists them with their hints.
    """

    exit_code = 3

    def __init__(self, report: PreflightReport) -> None:
        errors = [finding for finding in report.findings if finding.level == "error"]
        super().__init__(f"refused by preflight: {number_of(len(errors), 'error')}")
        self.report = report

    def __str__(self) -> str:
        return "\n".join((self.message, *self.report.lines))


class DiskOffloadRefused(PreflightRefused, ValueError):  # noqa: N818 - as its parent
    """The device map sends something to disk, or would have to.

    It is the `ValueError` that GPTQ users know, with exactly that text; `report.lines` lists the findings.
    """

    def __init__(self, report: PreflightReport) -> None:
        super().__init__(report)
        self.args = ("disk offload is not supported with GPTQ quantization",)
        self.message = self.args[0]

    def __str__(self) -> str:
        return self.message


class SourceChanged(GptqError):  # noqa: N818 - it says what happened
    """A file of the model changed since the run began. Nothing was written, and nothing is kept."""


class OutOfDeviceMemory(GptqError):  # noqa: N818 - named as the field names it
    """A device ran out of memory."""

    exit_code = 4


class RankLost(GptqError):  # noqa: N818 - it says what happened
    """One of the processes that work together ended, or does not answer: `rank`, where that is known."""

    def __init__(self, message: str, *, hint: str | None = None, rank: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.rank = rank


class Interrupted(KeyboardInterrupt):
    """A signal ended a run that had kept what it finished; `hint` is the command that goes on."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class QualityGateFailed(GptqError):  # noqa: N818 - a gate that failed
    """There is a result, and it does not meet what was asked for."""

    exit_code = 5


class NonFinite(QualityGateFailed):
    """A weight, an activation or a Hessian holds NaN or infinity."""


class WeightTooLarge(NonFinite):
    """A weight whose scales float16 cannot hold; left dense, it may stay. `reached`: its largest value."""

    def __init__(self, message: str, *, hint: str | None = None, reached: float = inf) -> None:
        super().__init__(message, hint=hint)
        self.reached = reached


class NotPositiveDefinite(QualityGateFailed):
    """A Hessian could not be factorised at any allowed damping, and --strict forbids the fallback."""


class LinearLost(QualityGateFailed):
    """Hardly anything of a linear is left after quantization, and --strict forbids that."""
