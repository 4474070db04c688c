"""A model whose blocks have weights only while they are worked on.

Quantizing needs one decoder block at a time, and never a finished one: its packed tensors are in their file.
So the blocks stay on the meta device. Each is read from the shards straight to the device that works on it
when its turn comes, and emptied afterwards; meanwhile a thread reads the next one as far as main memory. On
an accelerator there is one block, in main memory the bytes of another, however many blocks the model has.

    with BlockStream(skeleton, placement) as stream:
        with stream.for_capture(): ...                    # the embedding is there
        stream.release()                                  # … and has done its work
        with stream.on_device("model.layers.0"): ...      # stream.model.layers[0] has its weights

Outside the blocks, what a forward on text calls has its weights from the start, where the placement says.
What it does not call (a head that stays dense, a tower of images) is looked at tensor by tensor, and stays in
the files. Where the map has `cpu` beside an accelerator, the blocks and modules there rest in main memory and
are brought in by accelerate's hooks (`devices.offload`), as the map asks for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import torch

from gptq_cli.devices.accelerators import torch_device, working_on
from gptq_cli.devices.host_buffers import HostBuffers
from gptq_cli.devices.offload import OffloadChain, dispatch_modules, replace_dispatch_hooks
from gptq_cli.devices.out_of_memory import clear_frames, is_out_of_memory
from gptq_cli.errors import CheckpointError, ModelError
from gptq_cli.model.ahead import ReadAhead
from gptq_cli.model.conversion import Conversion
from gptq_cli.model.fill import (
    Filler,
    all_tensors,
    check_filled,
    compute_buffers,
    empty_out,
    get_tensor,
)
from gptq_cli.model.running import locate_by_values
from gptq_cli.model.shards import ShardFiles, Shards
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.streamed import Ahead, StreamedReader
from gptq_cli.model.text_part import uncalled_tensors
from gptq_cli.model.weights import check_tensor
from gptq_cli.placement.names import parents
from gptq_cli.placement.placement import Placement

_CPU = torch.device("cpu")


class BlockStream:
    """A context manager; `model` is a copy of the skeleton's: eval, no gradients, no cache.

    `order`: the blocks that will be worked on, all by default; the one behind the current one is read ahead,
    unless `reads_ahead` is False. Where there is no memory for it, that is said once (`tell`), and blocks
    are read when their turn comes. `shards`: where the bytes come from, by default the model's files.
    `looks_at_all`: a value that is not finite is found in tensors, too, with which nothing here is computed.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        placement: Placement,
        *,
        order: Sequence[str] | None = None,
        reads_ahead: bool = True,
        shards: Shards | None = None,
        looks_at_all: bool = True,
        tell: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.model: Any = copy.deepcopy(skeleton.model)
        locate_by_values(self.model)
        self.model.requires_grad_(False)
        self.model.config.use_cache = False
        self._placement, self._tell = placement, tell
        files = self._files = skeleton.files
        self._shards: Shards = shards if shards is not None else ShardFiles(files.directory, files.stamps)
        self._reader = StreamedReader(files.directory, files.tensors, shards=self._shards)
        self.blocks = skeleton.blocks
        self._filler = Filler(self.model, Conversion(self.model), skeleton.keys, skeleton.dtype)
        self._streamed: dict[str, list[str]] = {b: [] for b in skeleton.blocks if placement.streams(b)}
        self._outside: list[str] = []
        self._resting: list[str] = []
        self._unread: list[str] = []
        self._sort(skeleton, looks_at_all)
        following = [block for block in order or skeleton.blocks if block in self._streamed]
        self._next = dict(pairwise(following)) if reads_ahead else {}
        self._buffers = HostBuffers() if placement.main_device.is_accelerator else None
        self._ahead: ReadAhead[Ahead] | None = None
        self._chain: OffloadChain | None = None
        self._opened = ExitStack()
        self._releases = skeleton.head is None and skeleton.trace.flow.direct
        self._inside = {id(m) for block in skeleton.blocks for m in self.model.get_submodule(block).modules()}

    def _sort(self, skeleton: Skeleton, looks_at_all: bool) -> None:
        """Which tensor rests where: streamed with its block, on its device, or in the files."""
        uncalled = uncalled_tensors(self.model, skeleton.blocks, head=skeleton.head is not None)
        blocks = frozenset(skeleton.blocks)
        for name in self._filler.names:
            block = next((module for module in parents(name) if module in blocks), None)
            if block in self._streamed:
                self._streamed[block].append(name)
            elif block is not None:
                self._resting.append(name)
            elif name not in uncalled:
                self._outside.append(name)
            elif looks_at_all and name in skeleton.keys.origins:
                self._unread.append(name)

    def __enter__(self) -> Self:
        """Fill what rests in memory. Raises `ModelError` naming a tensor that cannot be read, `NonFinite`,
        and `SourceChanged`."""
        self._reader.__enter__()
        try:
            with self._explained():
                self._look_at_unread()
                self._filler.fill([*self._outside, *self._resting], self._get, self._device_of)
                compute_buffers(self.model, self._device_of)
                check_filled(self.model, [*self._outside, *self._resting])
            for name in self._outside:
                check_tensor(name, get_tensor(self.model, name))
            if len(self._placement.devices) > 1:
                entries = self._resting_entries()
                dispatch_modules(self.model, self._placement, entries)
                chain = replace_dispatch_hooks(self.model, self._placement, only=entries)
                self._chain = self._opened.enter_context(chain)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop_reading()
        self._opened.close()
        if self._buffers is not None:
            self._buffers.free()
        self._reader.__exit__(kind, value, traceback)

    @contextmanager
    def on_device(self, block: str) -> Iterator[None]:
        """Give `block` its weights on the device that works on it inside the `with`; afterwards they are
        dropped, changed or not. A block that rests on the cpu is moved there, and back."""
        if block not in self._streamed:
            with self._chain.on_device(block) if self._chain is not None else ExitStack():
                yield
            return
        filled = self._fill(block)
        try:
            self._read_next(block)
            yield
        finally:
            empty_out(self.model, filled)

    @contextmanager
    def for_capture(self) -> Iterator[None]:
        """A context inside which the model's own forward may run, without its blocks."""
        with self._chain.for_capture() if self._chain is not None else ExitStack():
            yield

    def release(self) -> None:
        """The model's own forward will not run again up to the blocks: where it need not run for anything
        else, what lies outside the blocks leaves memory, unless the map has it rest on the cpu."""
        if self._releases:
            kept = self._placement.offloaded
            gone = [name for name in self._outside if not any(e in kept for e in (name, *parents(name)))]
            empty_out(self.model, [name for name in gone if id(self._owner(name)) not in self._inside])

    def _owner(self, name: str) -> torch.nn.Module:
        owner: torch.nn.Module = self.model.get_submodule(name.rpartition(".")[0])
        return owner

    def _fill(self, block: str) -> set[str]:
        ahead = self._taken(block)
        free = None if ahead else self._buffers  # what was read ahead lies in them until it is copied
        get = partial(self._reader.get, ahead=ahead, buffers=free)
        with self._explained():
            filled = self._filler.fill(self._streamed[block], get, self._device_of)
        if self._buffers is not None:
            self._buffers.copying(torch_device(self._placement.device_of(block)))
        return filled

    def _taken(self, block: str) -> Ahead:
        """What was read ahead of a block; nothing where another one was expected, or memory ran out (that
        is an error where other ranks read along)."""
        if self._ahead is None or self._ahead.name != block:
            self._stop_reading()
            return {}
        found: Ahead = {}
        optional = ExitStack() if self._shards.together else self._without_it_where_memory_is_short(block)
        with optional, self._explained():
            found = self._ahead.take()
        self._stop_reading()
        return found

    def _read_next(self, block: str) -> None:
        """Begin to read the block behind this one."""
        following = self._next.get(block)
        if following is None:
            return
        wanted = self._filler.sources(self._streamed[following])
        ready = False
        with self._without_it_where_memory_is_short(following):
            if self._buffers is not None:
                self._buffers.rewind()
                self._buffers.reserve(self._reader.sizes_bytes(wanted))
            ready = True
        if not self._shards.agreed(ready):
            self._next = {}
            return
        device = self._device_of(following)

        def read(proceed: Callable[[], None]) -> Ahead:
            with working_on(device):  # a new thread starts on device 0, and waits for copies to this one
                return self._reader.read_ahead(wanted, self._buffers, proceed)

        self._ahead = ReadAhead(following, read)

    @contextmanager
    def _without_it_where_memory_is_short(self, block: str) -> Iterator[None]:
        """Reading ahead only saves time: where there is no memory for it, the run goes on without."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            clear_frames(error)
            self._stop_reading()
            self._next = {}
            if self._buffers is not None:
                self._buffers.free()
            self._tell(f"no memory to read {block} ahead: blocks are read when their turn comes")

    def _stop_reading(self) -> None:
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead = None

    def _look_at_unread(self) -> None:
        """Raise `NonFinite` for a tensor that is not finite, though nothing here is computed with it."""
        files = self._files
        with StreamedReader(files.directory, files.tensors, files.stamps) as reader:
            for name in self._unread:
                filled = self._filler.fill([name], reader.get, lambda target: _CPU)
                for found in sorted(filled):
                    check_tensor(found, get_tensor(self.model, found))
                empty_out(self.model, filled)

    def _resting_entries(self) -> list[str]:
        """The entries of the placement that have all their weights now."""
        empty = {name for name, tensor in all_tensors(self.model) if tensor.is_meta}
        without = {above for name in empty for above in (name, *parents(name))}
        return [entry.name for entry in self._placement.entries if entry.name not in without]

    def _get(self, name: str, device: torch.device) -> torch.Tensor:
        return self._reader.get(name, device, buffers=self._buffers)

    def _device_of(self, name: str) -> torch.device:
        return torch_device(self._placement.device_of(name))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise ModelError(
                f"{self._files.source} cannot be loaded: {error.message}", hint=error.hint
            ) from error
