"""A finished checkpoint read back before it is put in place, by the code that opens the files of any tool.

Names, shapes, dtypes and configs are compared with the model's class; values are not read again. A result
that does not pass is a defect of this tool, found before a person copies the files anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gptq_cli.checkpoint.checkpoint import QuantizedCheckpoint
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.checkpoint.verify import check_structure
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import CheckpointError, GptqError, ModelError
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.wording import and_others


def check_written(directory: Path, skeleton: Skeleton) -> None:
    """Raise `GptqError` unless the checkpoint in `directory`, made from `skeleton`, can be opened, holds
    every linear that was quantized, and has no error that `gptq load --verify` finds in headers."""
    try:
        checkpoint = open_checkpoint(
            directory, trust_remote_code=skeleton.ref.trust_remote_code, dtype=skeleton.ref.dtype
        )
    except (CheckpointError, ModelError) as error:
        if is_out_of_memory(error):
            raise
        problems = getattr(error, "problems", (error.message,))
        raise _defect(skeleton, list(problems)) from error
    problems = list(_differences(checkpoint, skeleton))
    if problems:
        raise _defect(skeleton, problems)


def _differences(checkpoint: QuantizedCheckpoint, skeleton: Skeleton) -> Iterator[str]:
    found = {info.source_name for info in (*checkpoint.linears, *checkpoint.experts)}
    wanted = {linear.source_name for linear in skeleton.packed}
    yield from (f"{name} was quantized, but is not read as quantized" for name in sorted(wanted - found))
    yield from (f"{name} is read as quantized, but was left dense" for name in sorted(found - wanted))
    for finding in check_structure(checkpoint):
        if finding.level == "error":
            yield f"{finding.subject}: {finding.message}"


def _defect(skeleton: Skeleton, problems: list[str]) -> GptqError:
    kind = getattr(skeleton.config, "model_type", "unknown")
    return GptqError(
        "the finished checkpoint does not pass its own verification, so it was not put in place: "
        f"{problems[0]}{and_others(problems, 'problem')}",
        hint=f"this is a defect of gptq: report it with the model's type ({kind}) and its config.json",
    )
