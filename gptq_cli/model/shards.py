"""Where the bytes of a model's tensors come from: its files, or the rank that sees them.

    ShardFiles        the files themselves
    SentShards        the files, and what is read of them goes to ranks that do not see them
    ReceivedShards    what such a rank is sent

The rank that sends and those that receive read the same tensors in the same order, as they do anyway: they
work on the same block. So nothing is asked for, and what is read once goes to all of them at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from gptq_cli.devices.host_buffers import PIECE_BYTES
from gptq_cli.errors import CheckpointError
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.headers import HeaderError, StoredTensor, read_header
from gptq_cli.model.source_files import FileStamp, check_unchanged
from gptq_cli.ranks.channel import Channel
from gptq_cli.wording import number_of


def _go_on() -> None:
    """Reading is not to be ended early."""


class Shards(Protocol):
    """The bytes of a model's tensors. One thread at a time may read."""

    @property
    def together(self) -> bool:
        """Whether other ranks take part in each reading, so that it must not be left out or ended early."""
        ...

    def stored(self, tensor: TensorInfo) -> StoredTensor:
        """What the header of its shard says of a tensor. Raises `CheckpointError`."""
        ...

    def read(
        self,
        tensor: TensorInfo,
        stored: StoredTensor,
        pieces: Iterable[Tensor],
        proceed: Callable[[], None] = _go_on,
        *,
        done: int = 0,
    ) -> None:
        """Read the bytes of a tensor from byte `done` on into `pieces` (uint8, in main memory). `proceed` is
        called now and then, and may raise to end it. Raises `CheckpointError` and `SourceChanged`."""
        ...

    def agreed(self, ready: bool) -> bool:
        """Whether all that take part are `ready`."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...

    def check(self) -> None:
        """Raise `SourceChanged` if a file that was read has changed since it was listed."""
        ...


class ShardFiles:
    """The shards of one directory; each is opened when its first tensor is wanted.

    With `stamps`, a shard that has changed is refused (`SourceChanged`) before every read.
    """

    together = False

    def __init__(self, directory: Path, stamps: Iterable[FileStamp] = ()) -> None:
        self._where = directory
        self._stamps = {stamp.name: stamp for stamp in stamps}
        self._files: dict[str, tuple[FileIO, dict[str, StoredTensor]]] = {}
        self._read: set[str] = set()

    def agreed(self, ready: bool) -> bool:
        """See `Shards.agreed`."""
        return ready

    def close(self) -> None:
        """See `Shards.close`."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def check(self) -> None:
        """See `Shards.check`."""
        self._check(*self._read)

    def stored(self, tensor: TensorInfo) -> StoredTensor:
        """See `Shards.stored`."""
        self._check(tensor.shard)
        try:
            return self._open(tensor.shard)[1][tensor.name]
        except (OSError, HeaderError, KeyError) as error:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.shard} cannot be read: {error}"
            ) from error

    def read(
        self,
        tensor: TensorInfo,
        stored: StoredTensor,
        pieces: Iterable[Tensor],
        proceed: Callable[[], None] = _go_on,
        *,
        done: int = 0,
    ) -> None:
        """See `Shards.read`."""
        file, _ = self._open(tensor.shard)
        try:
            file.seek(stored.begin + done)
            for part in _parts(pieces):
                proceed()
                found = file.readinto(cast(memoryview, part.numpy()))
                done += found or 0
                if found != len(part):
                    raise self._truncated(tensor, stored, done)
        except OSError as error:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.shard} cannot be read: {error}"
            ) from error

    def _truncated(self, tensor: TensorInfo, stored: StoredTensor, found: int) -> CheckpointError:
        self._check(tensor.shard)
        return CheckpointError(
            f"tensor {tensor.name} in {tensor.shard} has {number_of(stored.size_bytes, 'byte')}, "
            f"of which the file holds {found:,}",
            hint="the file is truncated: fetch it again",
        )

    def _check(self, *shards: str) -> None:
        check_unchanged(self._where, [self._stamps[shard] for shard in shards if shard in self._stamps])

    def _open(self, shard: str) -> tuple[FileIO, dict[str, StoredTensor]]:
        if shard not in self._files:
            path = self._where / shard
            stored = {tensor.name: tensor for tensor in read_header(path)}
            file = FileIO(path)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            self._files[shard] = (file, stored)
            self._read.add(shard)
        return self._files[shard]


class SentShards:
    """`files`, and what is read of them goes through `channel`."""

    together = True

    def __init__(self, files: ShardFiles, channel: Channel) -> None:
        self._files, self._channel = files, channel

    def stored(self, tensor: TensorInfo) -> StoredTensor:
        """See `Shards.stored`."""
        return self._files.stored(tensor)

    def read(
        self,
        tensor: TensorInfo,
        stored: StoredTensor,
        pieces: Iterable[Tensor],
        proceed: Callable[[], None] = _go_on,
        *,
        done: int = 0,
    ) -> None:
        """See `Shards.read`. Never ended early: others wait for the rest."""
        for part in _parts(pieces):
            self._files.read(tensor, stored, [part], done=done)
            self._channel.carry(part)
            done += len(part)

    def agreed(self, ready: bool) -> bool:
        """See `Shards.agreed`."""
        return self._channel.agreed(ready)

    def close(self) -> None:
        """See `Shards.close`."""
        self._files.close()

    def check(self) -> None:
        """See `Shards.check`."""
        self._files.check()


class ReceivedShards:
    """What comes through `channel`: the files are those of the rank that sends."""

    together = True

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def stored(self, tensor: TensorInfo) -> StoredTensor:
        """See `Shards.stored`."""
        return StoredTensor(tensor.name, tensor.dtype, tensor.shape, 0, tensor.size_bytes)

    def read(
        self,
        tensor: TensorInfo,
        stored: StoredTensor,
        pieces: Iterable[Tensor],
        proceed: Callable[[], None] = _go_on,
        *,
        done: int = 0,
    ) -> None:
        """See `Shards.read`. Never ended early: the rest is on its way."""
        for part in _parts(pieces):
            self._channel.carry(part)

    def agreed(self, ready: bool) -> bool:
        """See `Shards.agreed`."""
        return self._channel.agreed(ready)

    def close(self) -> None:
        """See `Shards.close`."""

    def check(self) -> None:
        """See `Shards.check`."""


def _parts(pieces: Iterable[Tensor]) -> Iterable[Tensor]:
    """Pieces of at most `PIECE_BYTES`, so that reading and sending take turns."""
    return (part for piece in pieces for part in torch.split(piece, PIECE_BYTES))
