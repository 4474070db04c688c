"""The small files of a checkpoint: its config, and what is copied from the source beside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from gptq_cli.model.source import read_json

COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "generation_config.json",
    "chat_template*",
    "*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
COPIED_FOLDERS = ("additional_chat_templates",)
_LIMIT_BYTES = 200_000_000


def checkpoint_config(source: Path, quantization: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The source's own config.json with the quantization and the dtype set: no other word is changed."""
    config = dict(read_json(source / "config.json"))
    name = str(dtype).removeprefix("torch.")
    _set_dtype(config, name)
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = text = dict(text)
        if "dtype" in text or "torch_dtype" in text:
            _set_dtype(text, name)
    config["quantization_config"] = dict(quantization)
    return config


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Both spellings are read in the wild; keep the one that is there, the old one where there is none."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, name))


def copy_sidecars(source: Path, target: Path, *, code: bool) -> tuple[str, ...]:
    """Copy tokenizer, generation config, templates and licences (and Python files with `code`); return
    their names."""
    patterns = (*COPIED, "*.py") if code else COPIED
    copied: list[str] = []
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in patterns)
        if path.is_file() and wanted and path.stat().st_size <= _LIMIT_BYTES:
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    for folder in COPIED_FOLDERS:
        if (source / folder).is_dir():
            (target / folder).mkdir()
            for path in sorted((source / folder).glob("*.jinja")):
                shutil.copyfile(path, target / folder / path.name)
                copied.append(f"{folder}/{path.name}")
    return tuple(copied)
