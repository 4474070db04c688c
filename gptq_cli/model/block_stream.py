"""A model whose blocks have weights only while they are processed.

Quantizing needs one decoder block at a time, and never a finished one: its packed tensors are in their file.
So where one device does all the work, the blocks stay on the meta device; each is filled from the shards when
its turn comes, and emptied afterwards. In memory are the embedding, the output head and one block, however
many blocks the model has.

    with BlockStream(skeleton, device) as stream:
        with stream.on_device("model.layers.0"): ...  # stream.model.layers[0] has its weights
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch

from gptq_cli.errors import CheckpointError, ModelError
from gptq_cli.model.conversion import Conversion
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.streamed import StreamedReader
from gptq_cli.model.weights import empty_out, fill_dense, fill_stored


class BlockStream:
    """A context manager; `model` is a copy of the skeleton's: eval, no gradients, no cache."""

    def __init__(self, skeleton: Skeleton, device: torch.device) -> None:
        self.model: Any = copy.deepcopy(skeleton.model)
        self.model.requires_grad_(False)
        self.model.config.use_cache = False
        self._device, self._dtype, self._keys = device, skeleton.dtype, skeleton.keys
        self._source = skeleton.files.source
        self._conversion = Conversion(self.model)
        self._reader = StreamedReader(skeleton.files.directory, skeleton.files.tensors, skeleton.files.stamps)
        self._inside = tuple(f"{name}." for name in skeleton.blocks)

    def __enter__(self) -> Self:
        """Fill everything outside the blocks. Raises `ModelError` naming a tensor that cannot be read, and
        `SourceChanged`."""
        self._reader.__enter__()
        try:
            fill_dense(
                self.model, self._conversion, self._keys, self._reader.get, self._device_of, self._dtype,
                wanted=lambda name: not name.startswith(self._inside),
            )  # fmt: skip
        except CheckpointError as error:
            self._reader.__exit__(None, None, None)
            raise self._unreadable(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, value, traceback)

    @contextmanager
    def on_device(self, block: str) -> Iterator[None]:
        """Give `block` its weights inside the `with`; afterwards they are dropped, changed or not."""
        try:
            filled = fill_stored(
                self.model, self._conversion, self._keys, self._reader.get, self._device_of, self._dtype,
                wanted=lambda name: name.startswith(f"{block}."),
            )  # fmt: skip
        except CheckpointError as error:
            raise self._unreadable(error) from error
        try:
            yield
        finally:
            empty_out(self.model, filled)

    @contextmanager
    def for_capture(self) -> Iterator[None]:
        """Nothing to do: what lies outside the blocks has its weights all the time."""
        yield

    def _device_of(self, name: str) -> torch.device:
        return self._device

    def _unreadable(self, error: CheckpointError) -> ModelError:
        return ModelError(f"{self._source} cannot be loaded: {error.message}", hint=error.hint)
