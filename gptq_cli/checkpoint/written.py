"""Reading back what an unfinished checkpoint holds: shards of a known layout, tensors of known digests."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.checkpoint.journal import digest
from gptq_cli.checkpoint.layout import PlannedShard, PlannedTensor
from gptq_cli.model.skeleton import as_torch_dtype


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
