"""Opening a GPTQ checkpoint of any tool: every name, dtype and shape is checked before a value is read.

The model is built from the checkpoint's config on the meta device, and Transformers' own key rules say which
module each `qweight` belongs to. Whatever does not match is a `CheckpointError` that names the tensor. No
code is executed, no pickle is opened and no shard outside the directory is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from gptq_cli.checkpoint.checkpoint import QuantizedCheckpoint
from gptq_cli.checkpoint.configs import checkpoint_directory, read_formats
from gptq_cli.checkpoint.format import PARTS, CheckpointFormat
from gptq_cli.checkpoint.match import CheckpointMatcher
from gptq_cli.config import DType, ModelRef
from gptq_cli.errors import CheckpointError
from gptq_cli.model.architecture import load_config
from gptq_cli.model.meta import build_meta
from gptq_cli.model.skeleton import as_torch_dtype, config_dtype, main_dtype
from gptq_cli.model.source import READABLE, ModelFiles, SourceProblem, scan_directory
from gptq_cli.wording import and_others


def open_checkpoint(
    path: str | Path, *, trust_remote_code: bool = False, dtype: DType = "auto"
) -> QuantizedCheckpoint:
    """Open the directory `path`. Reads configs and headers only. Raises `CheckpointError` and
    `ModelError`."""
    directory = checkpoint_directory(path)
    ref = ModelRef(model=str(path), trust_remote_code=trust_remote_code, dtype=dtype)
    raw, form = read_formats(directory)
    files = scan_directory(directory, bases=_base_names(raw, form))
    _raise_for(files.problems)
    config = load_config(files, ref)
    _forget_quantization(config)
    run_dtype = _run_dtype(config, files, dtype)
    model = build_meta(config, ref, run_dtype, tensors=len(files.tensors))
    return CheckpointMatcher(directory, raw, form, files, config, model, run_dtype).checkpoint()


def _forget_quantization(config: Any) -> None:
    """Remove quantization configs, because the model is built dense; so are parts left as plain
    dictionaries."""
    for name, inner in list(vars(config).items()):
        if name == "quantization_config":
            delattr(config, name)
        elif isinstance(inner, PretrainedConfig):
            _forget_quantization(inner)
        elif isinstance(inner, Mapping) and "quantization_config" in inner:
            delattr(config, name)


def _base_names(raw: Mapping[str, Any], form: CheckpointFormat) -> tuple[str, ...]:
    """Names that AutoGPTQ may have given the weights: the one in its config, and one made from the
    settings."""
    named = raw.get("model_file_base_name")
    made = f"gptq_model-{form.base.bits}bit-{form.base.group_size}g"
    return (named.removesuffix(".safetensors"), made) if isinstance(named, str) and named else (made,)


def _raise_for(problems: tuple[SourceProblem, ...]) -> None:
    serious = [problem for problem in problems if problem.kind not in READABLE]
    if serious:
        raise CheckpointError(
            serious[0].message + and_others(serious, "problem"),
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
