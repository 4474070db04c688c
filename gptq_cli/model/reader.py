"""Opening a GPTQ checkpoint, ours or anyone's: every name, dtype and shape is judged before a value is read.

The checkpoint's config builds the model on the meta device; Transformers' own key rules say which module each
`qweight` belongs to; what does not fit is a `CheckpointError` that names the tensor. Nothing is executed, no
pickle is opened and no shard outside the directory is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptq_cli.config import DType, ModelRef
from gptq_cli.errors import CheckpointError
from gptq_cli.files import shown
from gptq_cli.model.architecture import load_config
from gptq_cli.model.checkpoint import (
    PARTS,
    PackedInfo,
    QuantizedCheckpoint,
    dense_origins,
    read_packed,
    trivial_g_idx,
)
from gptq_cli.model.formats import CheckpointFormat, parse_quantization
from gptq_cli.model.judge import Judge
from gptq_cli.model.skeleton import as_torch_dtype, build_meta, config_dtype, main_dtype
from gptq_cli.model.source import ModelFiles, SourceProblem, local_directory, read_json, scan_directory

__all__ = [
    "PackedInfo",
    "QuantizedCheckpoint",
    "dense_origins",
    "open_checkpoint",
    "read_packed",
    "trivial_g_idx",
]

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
_AGREE = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")


def open_checkpoint(
    path: str | Path, *, trust_remote_code: bool = False, dtype: DType = "auto"
) -> QuantizedCheckpoint:
    """Open the directory `path`. Reads config and heads only. Raises `CheckpointError` and `ModelError`."""
    directory = local_directory(path, CheckpointError)
    if directory is None:
        raise CheckpointError(
            f"no such directory: {shown(path)}", hint="give the directory that `gptq quantize --out` wrote"
        )
    ref = ModelRef(model=str(path), trust_remote_code=trust_remote_code, dtype=dtype)
    raw, form = _read_formats(directory)
    files = scan_directory(directory, any_name=True)
    _raise_for(files.problems)
    config = load_config(files, ref)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    run_dtype = _run_dtype(config, files, dtype)
    model = build_meta(config, ref, run_dtype)
    return Judge(directory, raw, form, files, config, model, run_dtype).checkpoint()


def _read_formats(directory: Path) -> tuple[Mapping[str, Any], CheckpointFormat]:
    """The quantization dictionary of all files that hold one; they must agree."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name in (*CONFIG_FILES, "config.json"):
        if not (directory / name).is_file():
            continue
        try:
            content = read_json(directory / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        if isinstance(content, Mapping) and name == "config.json":
            content = content.get("quantization_config")
            if content is None:
                continue
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{directory}: the quantization config in {name} is no JSON object")
        found.append((name, content))
    if not found:
        raise CheckpointError(
            f"{directory} is no GPTQ checkpoint: there is neither a quantize_config.json nor a "
            "quantization_config in config.json",
            hint="quantize the model first: gptq quantize MODEL --out DIR",
        )
    parsed = [(name, parse_quantization(content, name)) for name, content in found]
    first, form = parsed[0]
    for name, other in parsed[1:]:
        for key in _AGREE:
            mine, theirs = getattr(form.base, key), getattr(other.base, key)
            if mine != theirs:
                raise CheckpointError(f"{key} is {mine!r} in {first} but {theirs!r} in {name}")
    return found[0][1], form


def _raise_for(problems: tuple[SourceProblem, ...]) -> None:
    serious = [problem for problem in problems if problem.kind not in ("no-tokenizer",)]
    if serious:
        more = f" (and {len(serious) - 1} more problems)" if len(serious) > 1 else ""
        raise CheckpointError(
            serious[0].message + more,
            hint=serious[0].hint or None,
            problems=tuple(problem.message for problem in serious),
        )


def _run_dtype(config: Any, files: ModelFiles, asked: DType) -> torch.dtype:
    if asked != "auto":
        return as_torch_dtype(asked)
    declared = config_dtype(config)
    if declared is not None:
        return declared
    parts = tuple(f".{part}" for part in PARTS)
    dense = replace(files, tensors=tuple(t for t in files.tensors if not t.name.endswith(parts)))
    return as_torch_dtype(main_dtype(dense) or "float16")
