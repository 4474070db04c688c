"""Copying a checkpoint's own files, so that every reader can open the copy.

Tensors are copied byte for byte and configs unchanged, except where readers could not find or would
misunderstand them: a single file becomes model.safetensors, shards get an index with the usual name,
config.json gets a quantization config that is only in another file, and zeros that are stored in another way
than the config says are stored as it says.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from gptq_cli.checkpoint.checkpoint import PackedInfo, QuantizedCheckpoint
from gptq_cli.checkpoint.configs import CONFIG_FILES
from gptq_cli.checkpoint.side_files import BESIDE, copy_sidecars
from gptq_cli.checkpoint.zeros import read_zeros, store_zeros
from gptq_cli.errors import CheckpointError, ConfigError
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.headers import read_header
from gptq_cli.model.source import INDEX, SINGLE, ModelFiles, read_json
from gptq_cli.model.source_files import is_copied, is_needed, outside_target
from gptq_cli.model.streamed import StreamedReader

_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """The files that a checkpoint was opened from, and their state at that time."""

    directory: Path
    files: ModelFiles
    states: Mapping[str, tuple[int, int]]
    """Name of a config or shard -> (bytes, time of its last change in nanoseconds)."""
    shards: tuple[str, ...]
    tensors: tuple[TensorInfo, ...]
    quantization: Mapping[str, Any]
    packed: tuple[PackedInfo, ...]

    @classmethod
    def of(cls, checkpoint: QuantizedCheckpoint) -> Self:
        """The files in their present state."""
        directory = checkpoint.directory
        shards = tuple(path.relative_to(directory).as_posix() for path in checkpoint.files.shards)
        configs = [name for name in ("config.json", *CONFIG_FILES) if (directory / name).is_file()]
        return cls(
            directory=directory.resolve(),
            files=replace(checkpoint.files, directory=directory.resolve()),
            states={name: _state(directory / name) for name in (*shards, *configs)},
            shards=shards,
            tensors=checkpoint.tensors,
            quantization=dict(checkpoint.config_dict),
            packed=(*checkpoint.linears, *checkpoint.experts),
        )

    @property
    def largest_bytes(self) -> int:
        """Size of the largest shard."""
        return max(self.states[name][0] for name in self.shards)

    def copy_to(self, target: Path) -> None:
        """Copy to `target`, complete or not at all; files of the same names there are replaced.

        Raises `CheckpointError` where a file was changed since, `ConfigError` where `target` is not a
        directory or holds other weights.
        """
        for name, then in self.states.items():
            if not (self.directory / name).is_file() or _state(self.directory / name) != then:
                raise CheckpointError(
                    f"{self.directory / name} was changed after the checkpoint was opened",
                    hint="open it again, then save it",
                )
        if target.resolve() == self.directory:
            return
        self._refuse_missing_links()
        names = {self.shards[0]: SINGLE} if len(self.shards) == 1 else {name: name for name in self.shards}
        _check_target(target, {*names.values(), *((INDEX,) if len(names) > 1 else ())})
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.parent / f".{target.name}.{secrets.token_hex(4)}"
        work.mkdir()
        try:
            self._fill(work, names)
            _put(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _refuse_missing_links(self) -> None:
        """Raise `CheckpointError` for a link out of the directory that stands for a part of the model."""
        for name in (stamp.name for stamp in self.files.stamps):
            if is_copied(name) and is_needed(name) and (target := outside_target(self.directory, name)):
                raise CheckpointError(
                    f"{name} is a link that leads out of {self.directory}, to {target}, and such links are "
                    "not followed into a copy",
                    hint=f"put a copy in its place: cp --remove-destination {shlex.quote(target)} "
                    f"{shlex.quote(str(self.directory / name))}",
                )

    def _fill(self, work: Path, names: Mapping[str, str]) -> None:
        for name, copied in names.items():
            (work / copied).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.directory / name, work / copied)
            self._store_zeros(name, work / copied)
        if len(names) > 1:
            _write_json(work / INDEX, self._index())
        config = read_json(self.directory / "config.json")
        copy_sidecars(self.files, work, code=bool(config.get("auto_map")))
        for name in (*BESIDE, *CONFIG_FILES):
            # what a link brings in from elsewhere is not the model's, and not for upload
            if (self.directory / name).is_file() and outside_target(self.directory, name) is None:
                shutil.copyfile(self.directory / name, work / name)
        if '"quantization_config"' in json.dumps(config):
            shutil.copyfile(self.directory / "config.json", work / "config.json")
        else:
            _write_json(work / "config.json", {**config, "quantization_config": dict(self.quantization)})

    def _index(self) -> dict[str, Any]:
        places = {tensor.name: tensor.shard for tensor in self.tensors}
        size = sum(tensor.size_bytes for tensor in self.tensors)
        return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}

    def _store_zeros(self, name: str, copied: Path) -> None:
        """Store symmetric zeros as the config says, where they are not."""
        here = {tensor.name for tensor in self.tensors if tensor.shard == name}
        packed = [info for info in self.packed if info.format.sym and f"{info.source_name}.qzeros" in here]
        stored = {tensor.name: tensor for tensor in read_header(copied)}
        with StreamedReader(self.directory, self.tensors) as reader, copied.open("r+b") as file:
            for info in packed:
                form, tensor = info.format, stored[f"{info.source_name}.qzeros"]
                zeros = read_zeros(reader.get(tensor.name), form, info.out_features)
                if zeros.stored != form.zeros:
                    words = store_zeros(zeros.values, form.bits, form.checkpoint_format)
                    file.seek(tensor.begin)
                    file.write(words.numpy().tobytes())


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _check_target(target: Path, names: set[str]) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; allowed: a directory", hint="choose another one")
    others = sorted(p.name for p in target.glob("*") if p.name.endswith(_WEIGHTS) and p.name not in names)
    if others:
        raise ConfigError(
            f"{target} holds other weights ({', '.join(others[:3])}{', …' if others[3:] else ''}), which a "
            "reader might take for these",
            hint="choose an empty directory",
        )


def _put(work: Path, target: Path) -> None:
    """Move everything into place, config.json last."""
    if not target.exists():
        work.rename(target)
        return
    files = sorted(
        (path for path in work.rglob("*") if path.is_file()), key=lambda p: p.name == "config.json"
    )
    for path in files:
        place = target / path.relative_to(work)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
