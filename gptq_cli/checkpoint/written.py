"""Reading back what an unfinished checkpoint holds: shards of a known layout, tensors of known digests; and
removing the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.checkpoint.journal import digest
from gptq_cli.checkpoint.layout import PlannedShard, PlannedTensor
from gptq_cli.checkpoint.working_folder import remove
from gptq_cli.model.skeleton import as_torch_dtype
from gptq_cli.wording import names_text


def remove_all_but(
    shards: Collection[str], folder: Path, known: Collection[str], warn: Callable[[str, str], None]
) -> None:
    """Remove everything that is not a shard: a run writes it anew. What is not `known` either came from
    elsewhere, and would be part of the checkpoint: `warn` is called with its names."""
    strange: list[str] = []
    for name in sorted(set(os.listdir(folder)) - set(shards)):
        path = folder / name
        inside = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]
        files = (below for below in inside if below.is_symlink() or not below.is_dir())
        names = (below.relative_to(folder).as_posix() for below in files)
        strange += [below for below in names if below not in known]
        remove(path)
    if strange:
        warn(
            f"removed {names_text(strange)} from {folder}: no run wrote that, and all that is there becomes "
            "the checkpoint",
            "files of yours are safe anywhere else",
        )


def is_begun(path: Path, shard: PlannedShard) -> bool:
    """Whether the file was begun by a run with this layout: its size and its header are the planned ones."""
    try:
        if path.is_symlink() or path.stat().st_size != shard.size_bytes:
            return False
        with path.open("rb") as file:
            return file.read(len(shard.header)) == shard.header
    except OSError:
        return False


def read_tensor(path: Path, shard: PlannedShard, planned: PlannedTensor) -> Tensor:
    """The tensor at its place in the file. Raises `OSError`."""
    dtype = as_torch_dtype(planned.dtype)
    data = _bytes_at(path, shard, planned.name)
    if not data:
        return torch.empty(planned.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(planned.shape)


def has_digest(path: Path, shard: PlannedShard, name: str, expected: str) -> bool:
    """Whether the bytes at the tensor's place in the file have this digest."""
    try:
        return digest(memoryview(_bytes_at(path, shard, name))) == expected
    except OSError:
        return False


def _bytes_at(path: Path, shard: PlannedShard, name: str) -> bytearray:
    begin, end = shard.places[name]
    data = bytearray(end - begin)
    with path.open("rb") as file:
        file.seek(begin)
        if file.readinto(data) != end - begin:
            raise OSError(f"{path} is truncated")
    return data
