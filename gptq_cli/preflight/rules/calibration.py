"""Rules about the calibration text: asked while it is cut into windows, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.errors import CalibrationError, ModelError
from gptq_cli.rules import Remark, rule


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCase:
    """An attempt to make calibration windows that failed."""

    model: str
    source: str
    """Of the text: a file, a data set, "builtin"."""
    failure: CalibrationError | ModelError


@rule("error")
def tokenizer(case: TextCase) -> list[Remark]:
    """The tokenizer of the model cannot be opened, so calibration text cannot become tokens."""
    if not isinstance(case.failure, ModelError):
        return []
    return [_remark(case.model, case.failure)]


@rule("error")
def calibration_text(case: TextCase) -> list[Remark]:
    """The calibration source cannot be read, or holds too little text for the windows that were asked for."""
    if not isinstance(case.failure, CalibrationError):
        return []
    return [_remark(case.source, case.failure)]


@rule("error")
def evaluation_text(case: TextCase) -> list[Remark]:
    """The text that the finished checkpoint is to be measured on cannot be read, or holds no window. It is
    cut before the work, because the measurement comes after hours of it.
    """
    return [_remark(case.source, case.failure)]


def _remark(subject: str, failure: CalibrationError | ModelError) -> Remark:
    return Remark(subject=subject, message=failure.message, hint=failure.hint or "")
