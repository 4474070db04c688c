"""Rules about the place that the checkpoint goes to."""

from __future__ import annotations

from gptq_cli.device import format_size
from gptq_cli.findings import Finding
from gptq_cli.preflight.budget import quantized_bytes
from gptq_cli.preflight.cases import JobCase

_OTHER_FILES_BYTES = 64_000_000
"""Tokenizer, reports, headers."""


def output_is_model(case: JobCase) -> list[Finding]:
    """The output is the model's own directory, or holds it: the original would be replaced by the result."""
    out = case.output
    if out is None or not out.is_model_directory:
        return []
    return [
        Finding(
            rule="output-is-model",
            level="error",
            subject="--out",
            message=f"{out.out} is or holds the directory of the model itself",
            hint=out.elsewhere,
        )
    ]


def output_exists(case: JobCase) -> list[Finding]:
    """The output exists already. Nothing is overwritten unasked, and `--overwrite` replaces a quantized model
    only, never a directory of something else. An empty directory is fine.
    """
    out = case.output
    if out is None or not out.exists or out.is_empty_directory or out.is_model_directory:
        return []
    if out.is_checkpoint and case.overwrite:
        return []
    if not out.is_directory:
        what, hint = "exists and is no directory", out.elsewhere
    elif not out.is_checkpoint:
        what = "holds something else than a quantized model, which --overwrite does not touch"
        hint = f"{out.elsewhere}; or remove the directory yourself"
    else:
        what, hint = "exists", f"--overwrite (replaces it as the last act); or {out.elsewhere}"
    return [
        Finding(rule="output-exists", level="error", subject="--out", message=f"{out.out} {what}", hint=hint)
    ]


def output_name_too_long(case: JobCase) -> list[Finding]:
    """The name of the output is longer than its file system allows; the last rename would fail."""
    out = case.output
    if out is None or out.name_bytes <= out.longest_name_bytes:
        return []
    return [
        Finding(
            rule="output-name-too-long",
            level="error",
            subject="--out",
            message=f"the name has {out.name_bytes} bytes; the file system allows {out.longest_name_bytes}",
            hint="give --out a shorter name",
        )
    ]


def output_unwritable(case: JobCase) -> list[Finding]:
    """The directory that the output is to be made in cannot be written to."""
    out = case.output
    if out is None or out.writable:
        return []
    return [
        Finding(
            rule="output-unwritable",
            level="error",
            subject="--out",
            message=f"{out.parent} cannot be written to",
            hint="give an --out in a directory of yours",
        )
    ]


def output_disk_full(case: JobCase) -> list[Finding]:
    """The disk of the output has less free space than the checkpoint will take.

    The checkpoint is written to a working folder beside its destination, so an old one that is to be
    overwritten still takes its space meanwhile.
    """
    out = case.output
    if out is None:
        return []
    needed = quantized_bytes(case.facts, case.work.quantize) + _OTHER_FILES_BYTES
    if needed <= out.free_bytes:
        return []
    return [
        Finding(
            rule="output-disk-full",
            level="error",
            subject="--out",
            message=f"the checkpoint takes about {format_size(needed)}, but {out.parent} has "
            f"{format_size(out.free_bytes)} free",
            hint=f"free {format_size(needed - out.free_bytes)}, or give an --out on another disk",
            size_bytes=needed,
        )
    ]


RULES = (output_is_model, output_exists, output_name_too_long, output_unwritable, output_disk_full)
