"""Finding a model and listing its tensors from file heads alone; what is wrong with the files comes back as
facts.

`find_model` raises only where there is no model to speak of: no such directory, an unreachable hub, no
config.json. Everything that is wrong *inside* a model directory (a truncated shard, a pickle, a shard that
the index forgot) is a `SourceProblem`, so that preflight can list all of them at once.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gptq_cli.config import ModelRef
from gptq_cli.errors import ModelError, UsageError
from gptq_cli.files import expanded, kind_of, reason, shown
from gptq_cli.model.headers import HeaderError, read_header
from gptq_cli.placement import TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?\Z", re.ASCII)
_JSON_LIMIT_BYTES = 200_000_000

Progress = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all) while files are fetched."""


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """Something wrong with a model's files."""

    kind: str
    """Stable, kebab-case: truncated-shard, corrupt-shard, missing-shard, unlisted-shard, missing-tensor,
    bad-index, unsafe-path, pickled-weights, no-weights, no-tokenizer, missing-weight, shape-mismatch,
    unsupported-dtype."""
    subject: str
    """The file or tensor."""
    message: str
    """Lower case, one sentence, complete in itself."""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model's files, known by their heads only."""

    directory: Path
    """Where config.json and the tokenizer are; the weights, too, unless they were not fetched."""
    source: str
    """What was asked for: the directory or the hub id."""
    revision: str | None = None
    """The commit, for a hub model."""
    tensors: tuple[TensorInfo, ...] = ()
    shards: tuple[Path, ...] = ()
    problems: tuple[SourceProblem, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)


def find_model(ref: ModelRef, *, weights: bool = True, progress: Progress | None = None) -> ModelFiles:
    """Open a local directory or a hub id. Reads heads only; `weights=False` does not even download the
    weights.

    Raises `ModelError` when there is no such model, when the hub cannot be reached, or without a
    config.json.
    """
    path = local_directory(ref.model, ModelError)
    if path is not None:
        return _with_config_checked(scan_directory(path, source=ref.model))
    if os.path.lexists(os.path.expanduser(ref.model.replace("\0", ""))):
        raise ModelError(
            f"{ref.model} is a file; allowed: a directory or a hub id",
            hint="give the directory that holds config.json and the safetensors files",
        )
    if not _HUB_ID.match(ref.model) or ref.model.startswith((".", "~")) or ".." in ref.model:
        raise ModelError(
            f"no such directory: {shown(ref.model)}",
            hint="give a directory with config.json and safetensors files, or a hub id such as org/name",
        )
    from gptq_cli.model.hub import fetch

    return _with_config_checked(fetch(ref, weights=weights, progress=progress))


def local_directory(text: str | Path, kind: type[UsageError]) -> Path | None:
    """The directory that `text` names, None where there is none. Raises `kind` if nobody may look there."""
    path = expanded(str(text))
    try:
        if kind_of(path) != "directory":
            return None
        if not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise kind(
            f"{shown(path)} cannot be opened: {reason(error)}",
            hint="give a directory that you may read, or a hub id such as org/name",
        ) from error
    return path


def _with_config_checked(files: ModelFiles) -> ModelFiles:
    if (files.directory / "config.json").is_file():
        return files
    if (files.directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{files.source} is an adapter, not a model",
            hint="merge it into its base model first (peft: merge_and_unload, then save_pretrained)",
        )
    raise ModelError(
        f"{files.source} has no config.json; a Hugging Face model directory has one",
        hint="give the directory that save_pretrained wrote, not its parent",
    )


def scan_directory(directory: Path, *, source: str | None = None, any_name: bool = False) -> ModelFiles:
    """List the tensors of a local directory, and everything that is wrong with its files.

    `any_name`: a lone safetensors file may be called anything (AutoGPTQ: gptq_model-4bit-128g.safetensors).
    """
    problems: list[SourceProblem] = []
    names, listed = _shard_names(directory, problems, any_name=any_name)
    tensors: list[TensorInfo] = []
    shards: list[Path] = []
    holder: dict[str, str] = {}
    for name in names:
        found = _read_shard(directory / name, name, problems)
        if found is None:
            continue
        shards.append(directory / name)
        for tensor in found:
            if tensor.name in holder:
                problems.append(
                    SourceProblem(
                        "corrupt-shard",
                        name,
                        f"tensor {tensor.name} is in {holder[tensor.name]} and in {name}",
                    )
                )
                continue
            holder[tensor.name] = name
            tensors.append(tensor)
    readable = {shard.name for shard in shards} | {str(shard.relative_to(directory)) for shard in shards}
    for tensor_name, shard_name in listed.items():
        if shard_name in readable and holder.get(tensor_name) != shard_name:
            problems.append(
                SourceProblem(
                    "missing-tensor",
                    tensor_name,
                    f"the index puts tensor {tensor_name} into {shard_name}, which does not hold it",
                    "fetch the model again",
                )
            )
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        problems.append(
            SourceProblem(
                "no-tokenizer",
                str(directory),
                f"there is no tokenizer in {directory} (none of {', '.join(TOKENIZER_FILES[:3])}, …)",
                "copy the tokenizer files of the model into its directory",
            )
        )
    return ModelFiles(
        directory=directory,
        source=source or str(directory),
        tensors=tuple(tensors),
        shards=tuple(shards),
        problems=tuple(problems),
    )


def read_json(path: Path) -> Any:
    """Parse a JSON file of sane size. Raises `ValueError` with a message that names the file."""
    if path.stat().st_size > _JSON_LIMIT_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes; allowed: {_JSON_LIMIT_BYTES}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error


def unsafe_path(name: str) -> bool:
    """True for a shard name that could leave the directory: absolute, with `..`, a drive, a backslash or a
    NUL."""
    pure = PurePosixPath(name)
    return (
        not name
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in name
        or "\0" in name
        or bool(PureWindowsPath(name).drive)
    )


def _shard_names(
    directory: Path, problems: list[SourceProblem], *, any_name: bool
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The shards to read in order, and the index's tensor -> shard map (empty without an index)."""
    if (directory / SINGLE).exists():
        return (SINGLE,), {}
    if not (directory / INDEX).is_file():
        lone = sorted(path.name for path in directory.glob("*.safetensors"))
        if any_name and len(lone) == 1:
            return (lone[0],), {}
        problems.append(_no_weights(directory))
        return (), {}
    try:
        weight_map = index_map(read_json(directory / INDEX))
    except (OSError, ValueError) as error:
        problems.append(SourceProblem("bad-index", INDEX, str(error), "fetch the model again"))
        return (), {}
    names = tuple(sorted(set(weight_map.values())))
    safe: list[str] = []
    for name in names:
        if unsafe_path(name):
            problems.append(
                SourceProblem(
                    "unsafe-path",
                    INDEX,
                    f"the index names shard {name!r}, which would leave the model's directory",
                    "do not trust this model; fetch it from its author",
                )
            )
        elif not name.endswith(".safetensors"):
            problems.append(
                SourceProblem(
                    "pickled-weights", INDEX, f"the index names shard {name!r}; allowed: *.safetensors"
                )
            )
        else:
            safe.append(name)
    unlisted = sorted({p.name for p in directory.glob("model-*-of-*.safetensors")} - set(names))
    problems.extend(
        SourceProblem(
            "unlisted-shard",
            name,
            f"{name} is in the directory, but the index does not name it",
            "fetch the model again",
        )
        for name in unlisted
    )
    return tuple(safe), weight_map


def index_map(index: object) -> dict[str, str]:
    """The checked `weight_map` of a parsed index file. Raises `ValueError`."""
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"{INDEX} has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ValueError(f"{INDEX} maps tensor {tensor} to {shard!r}; allowed: a file name")
    return dict(weight_map)


def _no_weights(directory: Path) -> SourceProblem:
    files = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        return SourceProblem(
            "pickled-weights",
            pickles[0],
            f"the weights are pickled ({', '.join(pickles[:3])}{', …' if len(pickles) > 3 else ''}); "
            "a pickle can run any program when it is opened, so only safetensors files are read",
            "convert them once, where you trust them: "
            'python -c "from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{directory}', dtype='auto').save_pretrained('{directory}')\"",
        )
    ggufs = [name for name in files if name.endswith(".gguf")]
    if ggufs:
        return SourceProblem(
            "no-weights",
            ggufs[0],
            f"the only weights are GGUF ({ggufs[0]}), which are quantized already",
            "give the original model in safetensors",
        )
    return SourceProblem(
        "no-weights",
        str(directory),
        f"there is neither {SINGLE} nor {INDEX} in {directory}",
        "fetch the model's safetensors files",
    )


def _read_shard(path: Path, name: str, problems: list[SourceProblem]) -> tuple[TensorInfo, ...] | None:
    try:
        stored = read_header(path)
    except FileNotFoundError:
        problems.append(
            SourceProblem("missing-shard", name, f"shard {name} is missing", "fetch the model again")
        )
        return None
    except HeaderError as error:
        kind = "truncated-shard" if "truncated" in str(error) else "corrupt-shard"
        problems.append(SourceProblem(kind, name, f"shard {name}: {error}", "fetch the file again"))
        return None
    except OSError as error:
        problems.append(
            SourceProblem("unreadable-shard", name, f"shard {name} cannot be read: {error.strerror}")
        )
        return None
    return tuple(TensorInfo(t.name, t.shape, t.dtype, t.size_bytes, name) for t in stored)


def without_weight_files(files: ModelFiles, tensors: Iterable[TensorInfo]) -> ModelFiles:
    """`files` with tensors that were listed remotely, and no shard on this disk."""
    problems = tuple(p for p in files.problems if p.kind not in ("no-weights", "missing-shard"))
    return replace(files, tensors=tuple(tensors), shards=(), problems=problems)
