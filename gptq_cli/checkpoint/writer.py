"""Writing a checkpoint so that it is either complete or not there.

Everything is written in a working folder beside the destination (`destination.py`) and moved there as the
last step. The plan (`layout.py`) gives each tensor its place in its file. So the shards are reserved on the
disk at the start (a disk that is too small is found in the first second, not after an hour), each tensor is
written to its place as soon as it is finished, behind the work (`behind.py`). Dense tensors are copied byte
for byte from the source's shards. The same tensors give the same bytes.

A run that goes on where an earlier one ended finds shards of the same layout, and adopts the tensors in them
whose digests its journal knows (`journal.py`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from gptq_cli.checkpoint.behind import WriteBehind
from gptq_cli.checkpoint.declared import block_name, declared_dynamic, modules_in_block
from gptq_cli.checkpoint.dense_values import dense_values
from gptq_cli.checkpoint.destination import Destination
from gptq_cli.checkpoint.format import PARTS, quantization_dict
from gptq_cli.checkpoint.held_signals import held_signals
from gptq_cli.checkpoint.journal import digest
from gptq_cli.checkpoint.layout import (
    CheckpointPlan,
    PlannedShard,
    PlannedTensor,
    plan_checkpoint,
)
from gptq_cli.checkpoint.place import check_destination
from gptq_cli.checkpoint.renames import FULL, fsync, reserve
from gptq_cli.checkpoint.self_check import check_written
from gptq_cli.checkpoint.side_files import checkpoint_config, copy_sidecars, file_names
from gptq_cli.checkpoint.values import CHUNK_BYTES, bytes_of, cast_to, rewrite, write_at
from gptq_cli.checkpoint.written import has_digest, is_begun, read_tensor, remove_all_but
from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import GptqError
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.model.headers import StoredTensor, read_header
from gptq_cli.model.selection import changed_settings
from gptq_cli.model.skeleton import BiasCut, LinearInfo, Skeleton, as_torch_dtype
from gptq_cli.model.source import INDEX
from gptq_cli.wording import number_of

OnShard = Callable[[Path, int, int], None]
"""Called with (path, bytes, tensors) when a shard is complete and on the disk."""


class CheckpointWriter:
    """A context manager; without `finish` nothing remains.

    The skeleton's linears will come packed; every other tensor is copied.
    `destination`: `out`, already entered by the caller, who leaves it as well.
    """

    def __init__(
        self,
        out: Path,
        skeleton: Skeleton,
        quantize: QuantizeConfig,
        max_shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
        *,
        on_shard: OnShard | None = None,
        destination: Destination | None = None,
    ) -> None:
        self._destination_given = destination is not None
        self._destination = destination or Destination(out, overwrite=overwrite)
        self.out = self._destination.out
        self.plan: CheckpointPlan = plan_checkpoint(skeleton, quantize, max_shard_bytes)
        self._skeleton, self._quantize, self._overwrite = skeleton, quantize, overwrite
        self._on_shard = on_shard
        self._work = self._destination.result
        self._shard_of = {t.name: shard for shard in self.plan.shards for t in shard.tensors}
        self._planned = {t.name: t for shard in self.plan.shards for t in shard.tensors}
        self._waiting = {shard.file: {t.name for t in shard.tensors} for shard in self.plan.shards}
        self._files: dict[str, int] = {}
        self._begun: set[str] = set()
        """Shards that an earlier run had begun."""
        self._unflushed: set[str] = set()
        self._digests: dict[str, str] = {}
        self._behind = WriteBehind()

    def __enter__(self) -> Self:
        try:
            with self.disk():
                if not self._destination_given:
                    self._destination.__enter__()
                check_destination(self.out, self._skeleton.files.directory, overwrite=self._overwrite)
                kept = {shard.file for shard in self.plan.shards}
                known = file_names(self._skeleton.files)
                remove_all_but(kept, self._work, known, self._destination.warn)
                for shard in self.plan.shards:
                    self._open_shard(shard)
                # now rather than at the end: unreadable files are found before the work
                code = self._skeleton.ref.trust_remote_code
                copy_sidecars(self._skeleton.files, self._work, code=code)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._discard()

    def add_packed(self, linear: LinearInfo, packed: PackedTensors) -> None:
        """Write the four tensors of a linear; its bias is copied like every dense tensor."""
        for part in PARTS:
            self._put(f"{linear.source_name}.{part}", getattr(packed, part))

    def flush(self) -> dict[str, str]:
        """Have every packed tensor on the disk; return the digests of those added since the last time."""
        self._settle()
        with self.disk():
            for file in sorted(self._unflushed & self._files.keys()):
                os.fsync(self._files[file])
        self._unflushed.clear()
        digests, self._digests = self._digests, {}
        return digests

    def take_back(self) -> None:
        """Expect the packed tensors that were added since the last `flush` once more."""
        self._settle()
        with self.disk():
            for name in self._digests:
                file = self._shard_of[name].file
                self._waiting[file].add(name)
                if file not in self._files:
                    self._files[file] = os.open(self._work / file, os.O_RDWR | getattr(os, "O_BINARY", 0))
        self._digests.clear()

    def damaged(self, digests: Mapping[str, str], replaced: Container[str]) -> str:
        """The first of these packed tensors that an earlier run did not leave in the files with this digest;
        "" where there is none. The bytes of those in `replaced` do not matter: `replace` writes them again.
        """
        for name, expected in digests.items():
            shard = self._shard_of.get(name)
            if shard is None or shard.file not in self._begun or self._planned[name].source is not None:
                return name
            if name not in replaced and not has_digest(self._work / shard.file, shard, name, expected):
                return name
        return ""

    def adopt(self, names: Iterable[str]) -> None:
        """Take these packed tensors, none of which is `damaged`, as an earlier run wrote them."""
        for name in names:
            self._written(self._shard_of[name], name, told=False)

    def packed_names(self, linears: Iterable[LinearInfo]) -> set[str]:
        """The names of the packed tensors of these linears."""
        return {f"{linear.source_name}.{part}" for linear in linears for part in PARTS}

    def read_packed(self, linear: LinearInfo) -> PackedTensors:
        """The tensors of a linear that are in the files."""
        self._settle()
        parts = {}
        for part in PARTS:
            name = f"{linear.source_name}.{part}"
            shard = self._shard_of[name]
            parts[part] = read_tensor(self._work / shard.file, shard, self._planned[name])
        return PackedTensors(**parts)

    def copy_dense(self) -> None:
        """Copy every dense tensor from the source, cast where the run's dtype differs from the source's
        main dtype. What is stored in few bits there is written decoded.

        Raises `NonFinite` when a cast overflows, and what `StreamedReader.get` raises.
        """
        wanted: dict[str, list[tuple[PlannedTensor, str]]] = {}
        valued: list[PlannedTensor] = []
        for tensor in self._planned.values():
            if tensor.source is None or tensor.name not in self._waiting[self._shard_of[tensor.name].file]:
                continue
            if tensor.target or tensor.source.coded is not None:
                valued.append(tensor)
            else:
                wanted.setdefault(tensor.source.shard, []).append((tensor, tensor.source.name))
        for tensor, values in dense_values(self._skeleton, valued):
            self._put(tensor.name, cast_to(tensor.name, values, as_torch_dtype(tensor.dtype)))
        for shard, tensors in wanted.items():
            path = self._skeleton.files.directory / shard
            self._skeleton.files.check(shard)
            stored = {entry.name: entry for entry in read_header(path)}
            with path.open("rb") as file:
                for tensor, source in tensors:
                    self._copy(file, stored[source], tensor)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Write other values in the places of tensors that are written. A run that ends before
        `put_in_place` has to do it again."""
        self._settle()
        if unplanned := sorted(tensors.keys() - self._planned.keys()):
            raise GptqError(f"tensor {unplanned[0]} is not in the plan")
        for shard in self.plan.shards:
            own = {name: tensors[name] for name in shard.places if name in tensors}
            with self.disk():
                rewrite(self._work / shard.file, shard, own)

    def finish(self, report: Mapping[str, Any]) -> int:
        """Write the remaining files and put the checkpoint in place; return its bytes on the disk."""
        self.complete(report)
        with held_signals() as check:
            check()
            return self.put_in_place()

    def complete(
        self, report: Mapping[str, Any], beside: Callable[[Path], Mapping[str, str]] | None = None
    ) -> None:
        """Write the remaining files, read the result back, and flush everything to the disk.

        `beside`: given the folder with the checkpoint, names and texts of further files.
        Raises `GptqError` where the result could not be opened again.
        """
        self._settle()
        missing = sorted(name for names in self._waiting.values() for name in names)
        if missing:
            raise GptqError(
                f"{number_of(len(missing), 'tensor', 'was', 'were')} never written, the first is {missing[0]}"
            )
        quantization = quantization_dict(
            self._quantize,
            dynamic=declared_dynamic(self._skeleton, changed_settings(self._skeleton, self._quantize)),
            modules_in_block=modules_in_block(self._skeleton),
            block_name=block_name(self._skeleton),
            lm_head=self._skeleton.head is not None,
        )
        config = checkpoint_config(
            self._skeleton.files.directory,
            quantization,
            self._skeleton.dtype,
            untie=self._skeleton.head_is_tied,
        )
        with self.disk():
            if len(self.plan.shards) > 1:
                self._json(INDEX, self._index())
            self._json("config.json", config)
            self._json("quantize_config.json", quantization)
            self._json("report.json", report)
        check_written(self._work, self._skeleton)
        texts = beside(self._work) if beside is not None else {}
        with self.disk():
            for name, text in texts.items():
                (self._work / name).write_text(text, encoding="utf-8")
            for path in self._work.rglob("*"):
                if path.suffix != ".safetensors":
                    fsync(path)
            fsync(self._work)

    def put_in_place(self) -> int:
        """The last step, after `complete`; return the checkpoint's bytes on the disk."""
        with self.disk():
            size = sum(path.stat().st_size for path in self._work.rglob("*") if path.is_file())
        self._skeleton.files.check()
        self._destination.put_in_place()
        return size

    def _index(self) -> dict[str, Any]:
        weight_map = {name: self._shard_of[name].file for name in sorted(self._shard_of)}
        return {"metadata": {"total_size": self.plan.tensor_bytes}, "weight_map": weight_map}

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"  # ASCII: a name may hold what UTF-8 cannot encode
        (self._work / name).write_text(text, encoding="utf-8")

    def _open_shard(self, shard: PlannedShard) -> None:
        path, flags = self._work / shard.file, os.O_RDWR | getattr(os, "O_BINARY", 0)
        if is_begun(path, shard):
            self._files[shard.file] = os.open(path, flags)
            self._begun.add(shard.file)
            return
        path.unlink(missing_ok=True)
        handle = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        self._files[shard.file] = handle
        reserve(handle, shard.size_bytes)
        write_at(handle, memoryview(shard.header), 0)
        if not shard.tensors:
            self._complete(shard)

    def _put(self, name: str, value: Tensor) -> None:
        planned = self._planned.get(name)
        if planned is None or name not in self._waiting[self._shard_of[name].file] or name in self._behind:
            raise GptqError(f"tensor {name} is not in the plan, or is written twice")
        if tuple(value.shape) != planned.shape or value.dtype != as_torch_dtype(planned.dtype):
            raise GptqError(
                f"tensor {name} is {value.dtype} {list(value.shape)}; "
                f"planned: {planned.dtype} {list(planned.shape)}"
            )
        shard = self._shard_of[name]
        begin, _ = shard.places[name]
        data, handle = bytes_of(value), self._files[shard.file]
        self._landed(self._behind.put(name, data.nbytes, lambda: _write_and_digest(handle, data, begin)))

    def _settle(self) -> None:
        """Have in the files what is on its way there."""
        self._landed(self._behind.settled())

    def _landed(self, done: Iterable[tuple[str, str]]) -> None:
        """Tensors that are in the files, and their digests."""
        with self.disk():
            for name, found in done:
                shard = self._shard_of[name]
                self._digests[name] = found
                self._unflushed.add(shard.file)
                self._written(shard, name)

    def _copy(self, source: BinaryIO, stored: StoredTensor, planned: PlannedTensor) -> None:
        shard = self._shard_of[planned.name]
        position, _ = shard.places[planned.name]
        target, dtype = self._files[shard.file], as_torch_dtype(planned.dtype)
        source.seek(stored.begin)
        if planned.cut is not None:
            self._copy_cut(source.read(stored.end - stored.begin), stored, planned, planned.cut)
            return
        for start in range(stored.begin, stored.end, CHUNK_BYTES):
            chunk = source.read(min(CHUNK_BYTES, stored.end - start))
            if planned.cast:
                values = torch.frombuffer(bytearray(chunk), dtype=as_torch_dtype(stored.dtype))
                chunk = bytes(bytes_of(cast_to(planned.name, values, dtype)))
            with self.disk():
                write_at(target, memoryview(chunk), position)
            position += len(chunk)
        with self.disk():
            self._written(shard, planned.name)

    def _copy_cut(self, content: bytes, stored: StoredTensor, planned: PlannedTensor, cut: BiasCut) -> None:
        values = torch.frombuffer(bytearray(content), dtype=as_torch_dtype(stored.dtype)).view(stored.shape)
        self._put(planned.name, cast_to(planned.name, cut.of(values), as_torch_dtype(planned.dtype)))

    def _written(self, shard: PlannedShard, name: str, *, told: bool = True) -> None:
        self._waiting[shard.file].discard(name)
        if not self._waiting[shard.file]:
            self._complete(shard, told=told)

    def _complete(self, shard: PlannedShard, *, told: bool = True) -> None:
        handle = self._files.pop(shard.file)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if self._on_shard is not None and told:
            self._on_shard(self._work / shard.file, shard.size_bytes, len(shard.tensors))

    def _discard(self) -> None:
        """Remove everything that was written but not put in place."""
        self._behind.close()
        for handle in self._files.values():
            with contextlib.suppress(OSError):
                os.close(handle)
        self._files.clear()
        if not self._destination_given:
            self._destination.__exit__(None, None, None)

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        """Turn errors of the disk into a `GptqError`."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EFBIG:
                largest = max(shard.size_bytes for shard in self.plan.shards)
                raise GptqError(
                    f"a file in {self._work.parent} may not be as large as it has to be, {largest} bytes",
                    hint="a smaller --max-shard-size, or a higher limit (ulimit -f), or another file system",
                ) from error
            if error.errno in FULL:
                free = shutil.disk_usage(_existing(self._work)).free
                raise GptqError(
                    f"no space left for {self._work.parent}: the checkpoint needs "
                    f"{self.plan.size_bytes} bytes, {free} are free",
                    hint="make room on that disk",
                ) from error
            raise GptqError(f"cannot write to {error.filename or self._work}: {error.strerror}") from error


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _write_and_digest(handle: int, data: memoryview, position: int) -> str:
    write_at(handle, data, position)
    return digest(data)
