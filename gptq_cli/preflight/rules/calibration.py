"""Rules about the calibration text: asked while it is cut into windows, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.calibration.text import AS_ROWS, TABLES
from gptq_cli.errors import CalibrationError, ModelError
from gptq_cli.placement.device import Device, format_size
from gptq_cli.planning.cases import DeviceNeed
from gptq_cli.rules import Remark, rule
from gptq_cli.wording import duration_words, number_of

LONG_SECONDS = 600.0
"""Of writing, from which on it is worth a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCase:
    """An attempt to make calibration windows that failed."""

    model: str
    source: str
    """Of the text: a file, a data set, "builtin"."""
    failure: CalibrationError | ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingCase:
    """A model that is to write its own calibration text, which is not kept from an earlier run."""

    tokens: int
    device: Device
    """Where it would write."""
    needs: tuple[DeviceNeed, ...]
    """What its devices would have to hold."""
    seconds: float | None
    """An estimate; None where none was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowsCase:
    """Calibration windows that were made."""

    source: str
    joined: int = 0
    """Conversations that no chat template wrote."""
    table: str = ""
    """What the source looks like, if that is not the plain text that it was read as: `JSON lines`."""


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


@rule("warning")
def no_chat_template(case: WindowsCase) -> list[Remark]:
    """The calibration text is conversations, and the model has no chat template to write them: their messages
    are joined by blank lines. A chat model is used through its template, which a copy of it may lack.
    """
    if not case.joined:
        return []
    return [
        Remark(
            subject=case.source,
            message=f"the model has no chat template: {number_of(case.joined, 'conversation', 'is', 'are')} "
            "read as messages joined by blank lines",
            hint="a chat model: put its chat_template.jinja beside it; a base model: give it plain text",
        )
    ]


@rule("warning")
def table_as_text(case: WindowsCase) -> list[Remark]:
    """The text is plain by its name and a table by its look: its syntax is read as text, too.

    JSON is read row by row where the name says so, by its end; a table of commas is not read as one.
    """
    if not case.table:
        return []
    end = next((suffix for suffix, kind in TABLES.items() if kind == case.table), None)
    named = f"give it a name that ends in {end}; a column is named after a colon: FILE{end}:COLUMN"
    return [
        Remark(
            subject=case.source,
            message=f"it looks like {case.table}, and is read as plain text: what separates and names the "
            "fields counts as text",
            hint=named if end is not None else AS_ROWS,
        )
    ]


@rule("error")
def own_text_memory(case: WritingCase) -> list[Remark]:
    """The model is to write its calibration text, and there is no memory for it as a whole.

    Quantizing works on one block after another; writing goes through all of them for every token.
    """
    return [
        Remark(
            subject=need.device,
            message=f"a model that writes its own text is in memory as a whole: {need.device} needs "
            f"{format_size(need.needed_bytes)} of {format_size(need.limit_bytes)}",
            hint="calibrate on a text: --calibration pydoc, or a file; or let the same model write it on a "
            "larger machine, where GPTQ_CACHE names a directory that both see",
        )
        for need in case.needs
        if need.needed_bytes > need.limit_bytes
    ]


@rule("warning")
def own_text_time(case: WritingCase) -> list[Remark]:
    """Writing the calibration text takes long on this device. What is written is kept for later runs."""
    if case.seconds is None or case.seconds < LONG_SECONDS:
        return []
    return [
        Remark(
            subject="self",
            message=f"the model writes {case.tokens} tokens of text on {case.device} first, about "
            f"{duration_words(case.seconds)}",
            hint="less text: --samples 64 --seq-len 512, or a part of it: --calibration self*0.25 "
            "--calibration pydoc*0.75; it is kept, so later runs do without",
        )
    ]


def _remark(subject: str, failure: CalibrationError | ModelError) -> Remark:
    return Remark(subject=subject, message=failure.message, hint=failure.hint or "")
