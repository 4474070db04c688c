"""Reading tensors one at a time, so that only the current one takes memory.

With a mapped file every page that was touched stays in the process, so after loading, the whole file would be
in memory beside the model. Here each tensor's bytes are read into a buffer of its own, which becomes the
tensor; the kernel is told to read ahead meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import torch
from torch import Tensor

from gptq_cli.errors import CheckpointError
from gptq_cli.model.decoding import decode
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.headers import HeaderError, StoredTensor, read_header
from gptq_cli.model.source_files import FileStamp, check_unchanged

_PAIRS = "float4_e2m1fn_x2"


class StreamedReader:
    """Open shards of one directory; each is opened when its first tensor is wanted, and closed at the end.

    With `stamps`, a shard that has changed is refused (`SourceChanged`) before every read and once more at
    the end of the `with`, so that all tensors are of one model.
    """

    def __init__(
        self, directory: Path, tensors: Iterable[TensorInfo], stamps: Iterable[FileStamp] = ()
    ) -> None:
        self._where = directory
        self._stamps = {stamp.name: stamp for stamp in stamps}
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._files: dict[str, tuple[FileIO, dict[str, StoredTensor]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file, _ in self._files.values():
            file.close()
        read = tuple(self._files)
        self._files.clear()
        if kind is None:
            self._check(*read)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def get(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor `name` on `device`, decoded where it is stored in few bits.

        Raises `CheckpointError` when it cannot be read, and what `decoding.decode` raises.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self._where} has no tensor {name}")
        info = self._tensors[name]
        if info.coded is None:
            return self._read(name, info.shard).to(device)
        parts = [self._read(part.name, part.shard) for part in info.coded.parts]
        return decode(info.coded, *parts).to(device)

    def _read(self, name: str, shard: str) -> Tensor:
        """The tensor as it is stored."""
        self._check(shard)
        try:
            file, stored = self._open_shard(shard)
            tensor = stored[name]
            buffer = torch.empty(tensor.size_bytes, dtype=torch.uint8)
            file.seek(tensor.begin)
            found = file.readinto(cast(memoryview, buffer.numpy())) if tensor.size_bytes else 0
        except (OSError, HeaderError, KeyError) as error:
            raise CheckpointError(f"tensor {name} in {shard} cannot be read: {error}") from error
        if found != tensor.size_bytes:
            self._check(shard)
            raise CheckpointError(
                f"tensor {name} in {shard} has {tensor.size_bytes} bytes, of which the file holds {found}",
                hint="the file is truncated: fetch it again",
            )
        if tensor.dtype == _PAIRS and tensor.shape:  # torch has no view of half a byte
            return buffer.view(*tensor.shape[:-1], -1)
        dtype = getattr(torch, tensor.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"tensor {name} has dtype {tensor.dtype}, which this torch does not know")
        return buffer.view(dtype).view(tensor.shape)

    def _check(self, *shards: str) -> None:
        check_unchanged(self._where, [self._stamps[shard] for shard in shards if shard in self._stamps])

    def _open_shard(self, shard: str) -> tuple[FileIO, dict[str, StoredTensor]]:
        if shard not in self._files:
            path = self._where / shard
            stored = {tensor.name: tensor for tensor in read_header(path)}
            file = FileIO(path)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            self._files[shard] = (file, stored)
        return self._files[shard]
