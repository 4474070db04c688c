"""From the model argument, a path or a Hub model id, to the files of the model."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

from gptq_cli.config import ModelRef
from gptq_cli.errors import ModelError, UsageError
from gptq_cli.files import expanded, kind_of, reason, shown
from gptq_cli.model.source import (
    ModelFiles,
    Progress,
    scan_directory,
)
from gptq_cli.model.source_files import (
    content_elsewhere,
    special_kind,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?\Z", re.ASCII)

_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.\-]+/[\w.\-]+)(?:/tree/([^/]+))?/?"
)


def find_model(ref: ModelRef, *, weights: bool = True, progress: Progress | None = None) -> ModelFiles:
    """Open a local directory or a Hub model id. Reads only the headers of weight files; `weights=False` does
    not even download them.

    Raises `ModelError` when the model does not exist or has no config.json, and when the Hub cannot be
    reached.
    """
    path = _directory(ref)
    if path is not None:
        return _with_config_checked(scan_directory(path, source=ref.model))
    from gptq_cli.model.hub import fetch

    return _with_config_checked(fetch(ref, weights=weights, progress=progress))


def glance_at_model(ref: ModelRef) -> ModelFiles:
    """What there is of the model without fetching a weight; without `problems` where weights may be missing.

    Raises what `find_model` raises.
    """
    path = _directory(ref)
    if path is not None:
        return _with_config_checked(scan_directory(path, source=ref.model))
    from gptq_cli.model.hub import fetch_small

    files = scan_directory(fetch_small(ref), source=ref.model)
    return _with_config_checked(replace(files, problems=()))


def is_on_hub(ref: ModelRef) -> bool:
    """Whether `ref` is the id of a model of the Hub, and not a directory here. Raises `ModelError`."""
    return _directory(ref) is None


def _directory(ref: ModelRef) -> Path | None:
    """The directory that holds the model; None: it has the form of a Hub model id. Raises `ModelError`."""
    path = local_directory(ref.model, ModelError)
    if path is not None and ref.revision:
        raise ModelError(
            f"{shown(ref.model)} is a directory, which has no revision {shown(ref.revision)}; a model on the "
            "Hub has revisions",
            hint="leave --revision out, of a preset too; or give the model's id on the Hub (org/name)",
        )
    if path is not None:
        return path
    if os.path.lexists(os.path.expanduser(ref.model.replace("\0", ""))):
        raise ModelError(
            f"{ref.model} is a file; allowed: a directory or a Hub model id",
            hint="give the directory that holds config.json and the safetensors files",
        )
    if not _HUB_ID.match(ref.model) or ref.model.startswith((".", "~")) or ".." in ref.model:
        raise ModelError(
            f"no such directory: {shown(ref.model)}",
            hint=_meant(ref.model)
            or "give a directory with config.json and safetensors files, or a Hub model id (org/name)",
        )
    return None


def _meant(text: str) -> str | None:
    """How to write a model of the Hub that is given by its address, or with its revision behind it."""
    page = _HUB_PAGE.fullmatch(text)
    name, _, revision = text.rpartition("@") if page is None else (page[1], "", page[2] or "")
    if not _HUB_ID.match(name) or ":" in revision:  # git@HOST:org/name names no revision
        return None
    return f"write {name}" + (f" --revision {revision}" if revision else "")


def local_directory(text: str | Path, kind: type[UsageError]) -> Path | None:
    """The directory that `text` names, None where there is none. Raises `kind` if it cannot be accessed, and
    for an empty text: a variable that a script did not set is not the current directory."""
    if not str(text):
        raise kind("the path is empty; allowed: a directory", hint="the current directory is '.'")
    path = expanded(str(text))
    try:
        if kind_of(path) != "directory":
            return None
        if not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise kind(
            f"{shown(path)} cannot be opened: {reason(error)}",
            hint="give a directory that you may read, or a Hub model id such as org/name",
        ) from error
    return path


def _with_config_checked(files: ModelFiles) -> ModelFiles:
    other = content_elsewhere(files.directory / "config.json")
    if other is not None:
        raise ModelError(f"config.json in {files.source} {other[0]}", hint=other[1])
    if (files.directory / "config.json").is_file():
        return files
    kind = special_kind(files.directory / "config.json")
    if kind is not None:
        raise ModelError(
            f"config.json in {files.source} is {kind}; allowed: a file",
            hint="do not trust this model; fetch it from its author",
        )
    if (files.directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{files.source} is an adapter, not a model",
            hint="merge it into its base model first (peft: merge_and_unload, then save_pretrained)",
        )
    raise ModelError(
        f"{files.source} has no config.json; a Hugging Face model directory has one",
        hint="give the directory that save_pretrained wrote, not its parent",
    )
