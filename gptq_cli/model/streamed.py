"""Reading tensors one at a time, so that only the current one takes memory.

With a mapped file every page that was touched stays in the process, so after loading, the whole file would be
in memory beside the model. Here each tensor's bytes are read into memory of their own. For the CPU that
memory becomes the tensor. For another device it is a buffer that is used again (`devices.host_buffers`), from
which the bytes are copied on. What is stored in few bits goes to the device as it is stored, and is decoded
there. Where the bytes come from, files or another rank, is a seam (`shards.py`).

    reader.get("lm_head.weight", device)                        read and place one tensor
    ahead = reader.read_ahead(names, buffers, proceed)          only read, in another thread for instance
    reader.get("lm_head.weight", device, ahead)                 place what was read
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gptq_cli.devices.host_buffers import PIECE_BYTES, HostBuffers
from gptq_cli.errors import CheckpointError
from gptq_cli.model.decoding import decode, decodes_on
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.headers import StoredTensor
from gptq_cli.model.shards import ShardFiles, Shards
from gptq_cli.model.source_files import FileStamp

_PAIRS = "float4_e2m1fn_x2"
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """The bytes of one tensor of a file, in main memory."""

    stored: StoredTensor
    pieces: list[Tensor]
    """uint8, one after another."""

    def on(self, device: torch.device) -> Tensor:
        """The tensor as it is stored, on `device`. In one piece it is not copied on the CPU."""
        if device.type == "cpu" and len(self.pieces) == 1:
            return as_stored(self.stored, self.pieces[0])
        whole = torch.empty(self.stored.size_bytes, dtype=torch.uint8, device=device)
        for part, piece in zip(torch.split(whole, [len(p) for p in self.pieces]), self.pieces, strict=True):
            part.copy_(piece, non_blocking=piece.is_pinned())
        return as_stored(self.stored, whole)


def as_stored(stored: StoredTensor, data: Tensor) -> Tensor:
    """Bytes as a tensor of the dtype and the shape that the header gives. Raises `CheckpointError` for a
    dtype that torch does not know."""
    if stored.dtype == _PAIRS and stored.shape:  # torch has no view of half a byte
        return data.view(*stored.shape[:-1], -1)
    dtype = getattr(torch, stored.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"tensor {stored.name} has dtype {stored.dtype}, which this torch does not know"
        )
    return data.view(dtype).view(stored.shape)


Ahead = MutableMapping[str, StoredBytes]
"""Name in the files -> bytes that were read ahead; they are taken out where they are used."""


class StreamedReader:
    """Tensors of one directory, or of what stands in its place: `shards`.

    With `stamps`, a shard that has changed is refused (`SourceChanged`) before every read and once more at
    the end of the `with`, so that all tensors are of one model. One thread at a time may read.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Iterable[TensorInfo],
        stamps: Iterable[FileStamp] = (),
        shards: Shards | None = None,
    ) -> None:
        self._where = directory
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._shards = shards if shards is not None else ShardFiles(directory, stamps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._shards.close()
        if kind is None:
            self._shards.check()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def get(
        self,
        name: str,
        device: torch.device | str = "cpu",
        ahead: Ahead | None = None,
        buffers: HostBuffers | None = None,
    ) -> Tensor:
        """The tensor `name` on `device`, decoded where it is stored in few bits.

        What is not in `ahead` is read now, on its way to another device through `buffers`. Raises
        `CheckpointError` when it cannot be read, and what `decoding.decode` raises.
        """
        device, info = torch.device(device), self._info(name)

        def part(tensor: TensorInfo, where: torch.device) -> Tensor:
            held = None if ahead is None else ahead.pop(tensor.name, None)
            return self._read(tensor, where, buffers) if held is None else held.on(where)

        if info.coded is None:
            return part(info, device)
        where = device if decodes_on(device) else _CPU
        codes, *scales = info.coded.parts
        return decode(info.coded, part(codes, where), *(part(scale, _CPU) for scale in scales)).to(device)

    def sizes_bytes(self, names: Iterable[str]) -> list[int]:
        """What the tensors `names` take as they are stored, part by part."""
        return [part.size_bytes for name in names for part in self._parts(name)]

    def read_ahead(
        self, names: Iterable[str], buffers: HostBuffers | None, proceed: Callable[[], None]
    ) -> Ahead:
        """The bytes of the tensors `names` as they are stored, in `buffers`, or in memory of their own where
        there are none. `proceed` is called between two pieces of work, and may raise to end it."""
        found: Ahead = {}
        for name in names:
            for part in self._parts(name):
                stored = self._shards.stored(part)
                pieces = _memory(stored.size_bytes) if buffers is None else buffers.take(stored.size_bytes)
                self._shards.read(part, stored, pieces, proceed)
                found[part.name] = StoredBytes(stored, pieces)
        return found

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(f"{self._where} has no tensor {name}")
        return self._tensors[name]

    def _parts(self, name: str) -> tuple[TensorInfo, ...]:
        info = self._info(name)
        return (info,) if info.coded is None else info.coded.parts

    def _read(self, tensor: TensorInfo, device: torch.device, buffers: HostBuffers | None) -> Tensor:
        """The tensor as it is stored."""
        stored = self._shards.stored(tensor)
        if buffers is None or device.type == "cpu":
            pieces = _memory(stored.size_bytes)
            self._shards.read(tensor, stored, pieces)
            return StoredBytes(stored, pieces).on(device)
        whole = torch.empty(stored.size_bytes, dtype=torch.uint8, device=device)
        done = 0
        for part in torch.split(whole, PIECE_BYTES):
            buffers.rewind()
            pieces = buffers.take(len(part))
            self._shards.read(tensor, stored, pieces, done=done)
            part.copy_(pieces[0])  # waits: the piece is used again
            done += len(part)
        return as_stored(stored, whole)


def _memory(size_bytes: int) -> list[Tensor]:
    return [torch.empty(size_bytes, dtype=torch.uint8)]
