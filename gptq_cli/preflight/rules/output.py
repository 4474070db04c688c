"""Rules about the output: may the checkpoint be written there, and is there room?"""

from __future__ import annotations

import os
import shlex

from gptq_cli.findings import Finding
from gptq_cli.placement.device import format_size
from gptq_cli.planning.cases import JobCase
from gptq_cli.planning.fisher import file_bytes
from gptq_cli.planning.memory import quantized_bytes
from gptq_cli.rules import Remark, Rule, rule

_OTHER_FILES_BYTES = 64_000_000
"""Kept for tokenizer, reports and headers."""


@rule("error")
def output_is_model(case: JobCase) -> list[Remark]:
    """The output is the model's own directory, or holds it: the original would be replaced by the result."""
    out = case.output
    if out is None or not out.is_model_directory:
        return []
    return [
        Remark(
            subject="--out",
            message=f"{out.out} is or holds the directory of the model itself",
            hint=out.elsewhere,
        )
    ]


@rule("error")
def output_exists(case: JobCase) -> list[Remark]:
    """The output exists already. Nothing is overwritten without `--overwrite`, which replaces a quantized
    model only, never a directory of something else. An empty directory is fine.

    A directory that cannot be renamed over (a mount point such as a container's volume, or one in a directory
    of somebody else) is filled where it is empty; `--overwrite` cannot replace a checkpoint in it, because
    that could not be done in one step.
    """
    out = case.output
    if out is None or not out.exists or out.is_empty_directory or out.is_model_directory:
        return []
    if out.is_checkpoint and case.overwrite and not out.is_fixed:
        return []
    hint = out.elsewhere
    if out.link_to_nothing:
        what = out.link_to_nothing
    elif not out.is_directory:
        what = "exists and is not a directory"
    elif not out.is_checkpoint:
        what = "holds something other than a quantized model, which --overwrite does not touch"
        hint = f"{out.elsewhere}; or remove the directory yourself"
    elif case.overwrite:
        what = "is a mount point or not yours, so it cannot be exchanged as --overwrite does"
    else:
        what, hint = "exists", f"--overwrite (replaces it as the last act); or {out.elsewhere}"
    if out.is_fixed and out.is_directory:
        inner = shlex.quote(os.path.join(out.out, "gptq"))
        hint = f"--out {inner} (a directory in it); or empty it yourself"
    return [Remark(subject="--out", message=f"{out.out} {what}", hint=hint)]


@rule("error")
def output_name_too_long(case: JobCase) -> list[Remark]:
    """A name in the output's path is longer than its file system allows; the last rename would fail."""
    out = case.output
    if out is None or out.name_bytes <= out.longest_name_bytes:
        return []
    return [
        Remark(
            subject="--out",
            message=f"the name has {out.name_bytes} bytes; the file system allows {out.longest_name_bytes}",
            hint="give --out a shorter name",
        )
    ]


@rule("error")
def output_name_not_text(case: JobCase) -> list[Remark]:
    """The path of the output is not UTF-8, or holds a NUL: most readers of models could not open it."""
    out = case.output
    if out is None or out.is_text:
        return []
    return [
        Remark(
            subject="--out",
            message=f"the path {out.out!r} is not UTF-8 text; most readers could not open a model there",
            hint="give --out a path in UTF-8",
        )
    ]


@rule("error")
def output_unwritable(case: JobCase) -> list[Remark]:
    """The directory that the output is to be made in cannot be written to, or an old checkpoint that
    `--overwrite` is to replace cannot be removed.
    """
    out = case.output
    if out is None:
        return []
    if out.failure:
        message, hint = out.failure, "give an --out that can be written to"
    elif out.parent_is_file:
        message, hint = f"{out.parent} is not a directory", "give an --out in a directory of yours"
    elif not out.writable:
        message, hint = f"{out.parent} cannot be written to", "give an --out in a directory of yours"
    elif out.is_checkpoint and case.overwrite and not out.is_removable:
        message = f"{out.out} holds directories that cannot be written to, so it cannot be replaced"
        hint = f"chmod -R u+w {shlex.quote(out.out)}, or give another --out"
    else:
        return []
    return [
        Remark(
            subject="--out",
            message=message,
            hint=hint,
        )
    ]


@rule("error")
def output_folder_taken(case: JobCase) -> list[Remark]:
    """Something that this tool did not make has the name of the working folder, beside the output."""
    out = case.output
    if out is None or not out.folder_taken:
        return []
    return [
        Remark(
            subject="--out",
            message=f"{out.folder_taken} is in the way: a working folder would have that name, "
            f"but {out.why_taken}",
            hint="rename it, or give another --out",
        )
    ]


@rule("error")
def output_busy(case: JobCase) -> list[Remark]:
    """Another run writes to the same output. Two runs, whatever links lead them there, do not share one."""
    out = case.output
    if out is None or not out.busy:
        return []
    return [_busy(out.busy, out.busy_hint)]


def busy_finding(message: str, hint: str) -> Finding:
    """The finding about a run that could not claim its output, before there is a case."""
    return output_busy.finding(_busy(message, hint))


def _busy(message: str, hint: str) -> Remark:
    return Remark(subject="--out", message=message, hint=hint)


KNOWN_EARLY: tuple[Rule[JobCase], ...] = (
    output_is_model,
    output_exists,
    output_name_too_long,
    output_name_not_text,
    output_unwritable,
    output_folder_taken,
    output_busy,
)
"""Errors that follow from the state of the output alone."""


@rule("warning")
def output_leftovers(case: JobCase) -> list[Remark]:
    """A run with the same output ended without cleaning up, as after kill -9. What it left is removed, and an
    old checkpoint that it had moved aside is put back.
    """
    out = case.output
    return [Remark(subject="--out", message=words) for words in (out.leftovers if out is not None else ())]


@rule("note")
def output_unlocked(case: JobCase) -> list[Remark]:
    """The file system of the output has no locks, so a file with the process number takes their place."""
    out = case.output
    if out is None or not out.unlocked:
        return []
    return [
        Remark(
            subject="--out",
            message=f"{out.unlocked}; a file with the process number keeps other runs of this machine out",
        )
    ]


@rule("error")
def output_disk_full(case: JobCase) -> list[Remark]:
    """The disk of the output has less free space than the checkpoint will take.

    The checkpoint is written to a working folder beside its destination, so an old one that is to be
    overwritten still takes its space meanwhile. So do gradients of the dense model (`--fisher-tokens`), which
    wait there for their block until the run ends.
    """
    out = case.output
    if out is None:
        return []
    weights = quantized_bytes(case.facts, case.work.quantize)
    checkpoint = weights + _OTHER_FILES_BYTES
    gradients = file_bytes(case.facts, case.work)
    needed = checkpoint + gradients
    if needed <= out.free_bytes:
        return []
    also = f", and gradients {format_size(gradients)} while the run works" if gradients else ""
    less = ", or --fisher-tokens 0" if gradients and checkpoint <= out.free_bytes else ""
    return [
        Remark(
            subject="--out",
            message=f"the checkpoint takes about {format_size(weights)}, and "
            f"{format_size(_OTHER_FILES_BYTES)} are kept for files beside it{also}, but {out.parent} has "
            f"{format_size(out.free_bytes)} free",
            hint=f"free {format_size(needed - out.free_bytes)}, or give an --out on another disk{less}",
            size_bytes=needed,
        )
    ]
