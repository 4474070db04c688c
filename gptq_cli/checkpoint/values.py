"""Values of tensors on their way into a file: cast, as bytes, at their place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.checkpoint.layout import PlannedShard
from gptq_cli.errors import GptqError, NonFinite
from gptq_cli.model.skeleton import as_torch_dtype

CHUNK_BYTES = 1 << 24


def write_at(handle: int, data: memoryview, position: int) -> None:
    """Write all of `data` at a place in an open file. Raises `OSError`."""
    view = data.cast("B")
    while view:
        count = os.pwrite(handle, view[:CHUNK_BYTES], position)
        view, position = view[count:], position + count


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def cast_to(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` of the tensor `name` in another dtype. Raises `NonFinite` when the cast overflows."""
    result = values.to(dtype)
    overflowed = torch.isfinite(values) & ~torch.isfinite(result)
    if bool(overflowed.any()):
        value = float(values[overflowed][0])
        raise NonFinite(
            f"tensor {name} holds {value:g}, which {dtype} cannot hold", hint="use --dtype auto or bfloat16"
        )
    return result


def rewrite(path: Path, shard: PlannedShard, tensors: Mapping[str, Tensor]) -> None:
    """Write other values in the places of tensors that are in the file, and flush them to the disk. Raises
    `OSError`, and `GptqError` for a tensor of another shape than planned."""
    planned = {tensor.name: tensor for tensor in shard.tensors}
    with path.open("r+b") as file:
        for name, value in tensors.items():
            if tuple(value.shape) != planned[name].shape:
                raise GptqError(f"tensor {name} is {list(value.shape)}; planned: {list(planned[name].shape)}")
            data = bytes_of(cast_to(name, value, as_torch_dtype(planned[name].dtype)))
            write_at(file.fileno(), data, shard.places[name][0])
        os.fsync(file.fileno())
