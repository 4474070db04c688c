"""The small files of a checkpoint: its config, and the files copied from the source beside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptq_cli.model.facts import dtype_name
from gptq_cli.model.source import INDEX, ModelFiles, read_json
from gptq_cli.model.source_files import check_unchanged, is_copied, is_pointer, outside_target

BESIDE = ("README.md", "loss_per_block.svg", "report.json")
"""What a run writes for people."""
_INNER_CONFIGS = 2
"""How deep configs stand inside config.json: thinker_config has a text_config."""


def file_names(files: ModelFiles) -> frozenset[str]:
    """Names of all files that a run may write beside the weights."""
    copied = (stamp.name for stamp in files.stamps if is_copied(stamp.name))
    return frozenset((*copied, *BESIDE, INDEX, "config.json", "quantize_config.json"))


def checkpoint_config(
    source: Path, quantization: Mapping[str, Any], dtype: torch.dtype, *, untie: bool
) -> dict[str, Any]:
    """The source's config.json with the quantization and the dtype set, and nothing else changed.

    A quantization of the source, whose weights were decoded, is replaced wherever a config keeps one.
    `untie`: say that the head is not the embedding, which a quantized head never is.
    """
    config = _with_dtype(read_json(source / "config.json"), dtype_name(dtype))
    config.pop("compression_config", None)
    if untie:  # a class may tie by default, so it is said wherever readers look
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    config["quantization_config"] = dict(quantization)
    return config


def _with_dtype(config: Mapping[str, Any], name: str, depth: int = 0) -> dict[str, Any]:
    """The dtype set in a config, and in the configs inside it (text, vision, audio) that name one."""
    result = dict(config)
    for key, inner in config.items():
        if key == "quantization_config":
            del result[key]  # of the source, whose weights were decoded
        elif isinstance(inner, Mapping) and depth < _INNER_CONFIGS and "quantization" not in key:
            result[key] = _with_dtype(inner, name, depth + 1)
    if depth == 0 or "dtype" in result or "torch_dtype" in result:
        _set_dtype(result, name)
    return result


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Set the dtype under the key that is there, or else under torch_dtype, which old and new readers
    know."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, name))


def copy_sidecars(files: ModelFiles, target: Path, *, code: bool) -> tuple[str, ...]:
    """Copy tokenizer, generation config, templates and licences (and Python files with `code`); return
    their names.

    Only files that were there when the model was opened are copied; if one has changed since, `SourceChanged`
    is raised. A link that leads out of the directory and a pointer of Git LFS are left out: preflight has
    reported them.
    """
    copied: list[str] = []
    for stamp in files.stamps:
        name = stamp.name
        if not is_copied(name, code=code):
            continue
        if outside_target(files.directory, name) is not None or is_pointer(files.directory / name):
            continue
        check_unchanged(files.directory, (stamp,))
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(files.directory / name, target / name)
        copied.append(name)
    return tuple(copied)
