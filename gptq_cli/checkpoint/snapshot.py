"""Named tensors in one safetensors file, written and read one at a time, with a digest of the whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.checkpoint.journal import JournalError, Part
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.headers import HeaderError, StoredTensor, build_header, read_header
from gptq_cli.model.skeleton import as_torch_dtype

_CHUNK_BYTES = 1 << 24


def write_snapshot(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> Part:
    """Write the tensors, from whatever device they are on, and flush them to the disk. Raises `OSError`."""
    named = dict(tensors)
    header, places = build_header({n: (dtype_name(t.dtype), tuple(t.shape)) for n, t in named.items()})
    hashed = hashlib.blake2b(header, digest_size=16)
    with path.open("wb") as file:
        file.write(header)
        for name in sorted(places, key=lambda name: places[name]):
            data = _bytes(named[name])
            hashed.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return Part(path.name, file.tell(), hashed.hexdigest())


def read_snapshot(folder: Path, part: Part) -> dict[str, Callable[[], Tensor]]:
    """The tensors of a snapshot, each read from the file when it is called for. Raises `JournalError` unless
    the file is the one that `part` describes."""
    path = folder / part.file
    hashed = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                hashed.update(chunk)
        if hashed.hexdigest() != part.digest:
            raise JournalError(f"{part.file} is damaged: its digest does not fit")
        stored = read_header(path)
    except FileNotFoundError as error:
        raise JournalError(f"{part.file} is missing") from error
    except (OSError, HeaderError) as error:
        raise JournalError(f"{part.file} cannot be read: {error}") from error
    return {tensor.name: partial(_read, path, tensor) for tensor in stored}


def _read(path: Path, stored: StoredTensor) -> Tensor:
    data = bytearray(stored.size_bytes)
    with path.open("rb") as file:
        file.seek(stored.begin)
        file.readinto(data)
    return torch.frombuffer(data, dtype=as_torch_dtype(stored.dtype)).reshape(stored.shape)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
