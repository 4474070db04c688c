"""Reading single tensors out of shards: the interface, and a reader that maps the files into memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_cli.errors import CheckpointError
from gptq_cli.model.facts import TensorInfo


class TensorReader:
    """The shards of one directory; each is opened when its first tensor is read, and closed at the end.

    A tensor read to the CPU is a view of the mapped file: it takes no memory of its own until it is written
    to.
    """

    def __init__(self, directory: Path, tensors: Iterable[TensorInfo]) -> None:
        self._directory = directory
        self._tensors: Mapping[str, TensorInfo] = {tensor.name: tensor for tensor in tensors}
        self._stack = ExitStack()
        self._open: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def get(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor `name` on `device`. Raises `CheckpointError` when it cannot be read."""
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self._directory} has no tensor {name}")
        try:
            tensor = self._shard(info.shard, str(device)).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} in {info.shard} cannot be read: {error}") from error
        assert isinstance(tensor, Tensor)
        return tensor

    def _shard(self, shard: str, device: str) -> Any:
        key = (shard, device)
        if key not in self._open:
            opened = safe_open(self._directory / shard, framework="pt", device=device)
            self._open[key] = self._stack.enter_context(opened)
        return self._open[key]
