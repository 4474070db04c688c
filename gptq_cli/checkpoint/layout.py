"""Which tensor goes to which place of which file, decided before the first weight is read.

The shapes of packed tensors follow from K, N and the format, so every shard's header, its size and the size
of the checkpoint are known at the start. So the writer can write each tensor to its place as soon as it is
finished, in any order and without keeping a shard in memory, and can reserve disk space before the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptq_cli.checkpoint.format import PART_DTYPES, PackedFormat
from gptq_cli.config import QuantizeConfig
from gptq_cli.model.blocks import is_linear
from gptq_cli.model.conversion import natural_key
from gptq_cli.model.facts import TensorInfo, dtype_name
from gptq_cli.model.headers import DTYPES, TORCH_TO_SAFETENSORS, build_header
from gptq_cli.model.skeleton import LinearInfo, Skeleton, main_dtype
from gptq_cli.placement.names import fold


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the planned checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None
    """Where a dense tensor is copied from; None for a packed one."""

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[TORCH_TO_SAFETENSORS[self.dtype]][1] // 8

    @property
    def cast(self) -> bool:
        """The dtype differs from the source's."""
        return self.source is not None and self.source.dtype != self.dtype


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file: its header, and every tensor's place."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes
    places: dict[str, tuple[int, int]]

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """All files with tensors."""

    shards: tuple[PlannedShard, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without the headers."""
        return sum(tensor.size_bytes for shard in self.shards for tensor in shard.tensors)


def packed_format(quantize: QuantizeConfig, linear: str | None = None) -> PackedFormat:
    """The format in which a configuration is stored; with `linear`, the one of that linear."""
    own = quantize if linear is None else quantize.of_linear(linear)
    return PackedFormat(
        bits=own.bits,
        group_size=own.group_columns,
        sym=own.sym,
        desc_act=quantize.desc_act,
        checkpoint_format=quantize.checkpoint_format,
    )


def plan_checkpoint(skeleton: Skeleton, quantize: QuantizeConfig, max_shard_bytes: int) -> CheckpointPlan:
    """Lay out the checkpoint: the linears of the skeleton are stored packed, the rest dense."""
    groups = _tensor_groups(skeleton, quantize)
    filled: list[list[PlannedTensor]] = [[]]
    size = 0
    for group in groups:
        added = sum(tensor.size_bytes for tensor in group)
        if filled[-1] and size + added > max_shard_bytes:
            filled.append([])
            size = 0
        filled[-1] += group
        size += added
    shards = []
    for number, tensors in enumerate(filled, start=1):
        single = len(filled) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(filled):05d}.safetensors"
        header, places = build_header({t.name: (t.dtype, t.shape) for t in tensors})
        shards.append(PlannedShard(file, tuple(tensors), header, places))
    return CheckpointPlan(tuple(shards))


def _tensor_groups(skeleton: Skeleton, quantize: QuantizeConfig) -> Iterator[list[PlannedTensor]]:
    """Tensors in natural order of their names; the parts of one linear stay together in a file."""
    packed = {linear.source_key: linear for linear in skeleton.packed}
    stored, run = main_dtype(skeleton.files), dtype_name(skeleton.dtype)
    for tensor in sorted(skeleton.files.tensors, key=lambda t: natural_key(t.name)):
        linear = packed.pop(tensor.name, None)
        if linear is None:
            dtype = run if tensor.dtype == stored else tensor.dtype
            yield [PlannedTensor(tensor.name, dtype, tensor.shape, tensor)]
            continue
        yield _packed_tensors(linear, quantize)
    for linear in packed.values():  # a head whose weight is the embedding's in the source
        yield _packed_tensors(linear, quantize)


def _packed_tensors(linear: LinearInfo, quantize: QuantizeConfig) -> list[PlannedTensor]:
    shapes = packed_format(quantize, linear.name).shapes(linear.in_features, linear.out_features)
    return [
        PlannedTensor(f"{linear.source_name}.{part}", PART_DTYPES[part], shapes[part], None)
        for part in PART_DTYPES
    ]


def dense_names(skeleton: Skeleton) -> tuple[str, ...]:
    """Source names of the modules inside blocks that hold matrices and stay dense."""
    quantized = {linear.name for linear in skeleton.linears}
    inside = tuple(f"{block}." for block in skeleton.blocks)
    names: dict[str, None] = {}
    for name, module in skeleton.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if name in quantized or not name.startswith(inside) or all(p.ndim < 2 for p in own.values()):
            continue
        sources = [
            source
            for leaf in own
            if (origin := skeleton.keys.origins.get(f"{name}.{leaf}")) is not None
            for source in origin.sources
        ]
        names[_common_parent(sources) if sources else name] = None
    return tuple(names)


def dynamic_of(
    dense: Iterable[str], changed: Mapping[str, Mapping[str, Any]], others: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """`dynamic`: "-:pattern" for what stays dense, "+:pattern" for what has settings of its own.

    All are source names; `others` are those of the linears that are quantized as the rest. A pattern is
    folded over the blocks where that covers none that is treated otherwise.
    """
    treated: dict[str, dict[str, Any] | None] = dict.fromkeys(dense)
    treated |= {name: dict(fields) for name, fields in changed.items()}
    kinds: dict[str, list[dict[str, Any] | None]] = {}
    for name, fields in (*treated.items(), *((name, {}) for name in others)):
        kinds.setdefault(fold(name), []).append(fields)
    entries: dict[str, dict[str, Any]] = {}
    for name, fields in treated.items():
        alike = all(other == fields for other in kinds[fold(name)])
        pattern = re.escape(fold(name)).replace(r"\*", r"\d+") if alike else re.escape(name)
        if fields is None:
            entries[rf"-:{pattern}(\..*)?$"] = {}
        else:
            entries[f"+:{pattern}$"] = fields
    return entries


def _common_parent(names: Sequence[str]) -> str:
    """The dotted components that all names begin with, without their last one."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join(parts[0][:shared])


def modules_in_block(skeleton: Skeleton) -> tuple[str, ...]:
    """Names inside a block of the quantized linears, if some linear of a block stays dense; otherwise ().

    Also () where a linear is quantized in one block and dense in another, which such a list cannot say.
    """
    quantized = {linear.name for linear in skeleton.linears}
    inside = dict.fromkeys(linear.name.removeprefix(f"{linear.block}.") for linear in skeleton.linears)
    dense = {
        name
        for block in skeleton.blocks
        for name, module in skeleton.model.get_submodule(block).named_modules()
        if is_linear(module) and f"{block}.{name}" not in quantized
    }
    return tuple(inside) if dense and dense.isdisjoint(inside) else ()
