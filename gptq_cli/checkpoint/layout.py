"""Which tensor goes to which place of which file, decided before the first weight is read.

The shapes of packed tensors follow from K, N and the format, so every shard's header, its size and the size
of the checkpoint are known at the start. So the writer can write each tensor to its place as soon as it is
finished, in any order and without keeping a shard in memory, and can reserve disk space before the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from gptq_cli.checkpoint.format import PART_DTYPES, PackedFormat
from gptq_cli.config import QuantizeConfig
from gptq_cli.model.blocks import is_linear
from gptq_cli.model.conversion import natural_key
from gptq_cli.model.facts import TensorInfo, dtype_name
from gptq_cli.model.headers import DTYPES, TORCH_TO_SAFETENSORS, build_header
from gptq_cli.model.skeleton import BiasCut, LinearInfo, Skeleton, main_dtype
from gptq_cli.placement.names import fold


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the planned checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None
    """Where a dense tensor is copied from; None for a packed one."""
    cut: BiasCut | None = None
    """Which part of the source it is; None for all of it."""

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


def packed_format(quantize: QuantizeConfig) -> PackedFormat:
    """The format in which a configuration is stored."""
    return PackedFormat(
        bits=quantize.bits,
        group_size=quantize.group_columns,
        sym=quantize.sym,
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
    packed: dict[str, list[LinearInfo]] = {}
    cut: dict[str, list[LinearInfo]] = {}
    for linear in skeleton.linears:
        packed.setdefault(linear.source_key, []).append(linear)
        if linear.bias_cut is not None:
            cut.setdefault(linear.bias_cut.source_key, []).append(linear)
    form = packed_format(quantize)
    stored, run = main_dtype(skeleton.files), dtype_name(skeleton.dtype)
    for tensor in sorted(skeleton.files.tensors, key=lambda t: natural_key(t.name)):
        dtype = run if tensor.dtype == stored else tensor.dtype
        for linear in packed.get(tensor.name, ()):
            shapes = form.shapes(linear.in_features, linear.out_features)
            yield [
                PlannedTensor(f"{linear.source_name}.{part}", PART_DTYPES[part], shapes[part], None)
                for part in PART_DTYPES
            ]
        for linear in cut.get(tensor.name, ()):
            shape = (linear.out_features,)
            yield [PlannedTensor(f"{linear.source_name}.bias", dtype, shape, tensor, linear.bias_cut)]
        if tensor.name not in packed and tensor.name not in cut:
            yield [PlannedTensor(tensor.name, dtype, tensor.shape, tensor)]


def dense_patterns(skeleton: Skeleton) -> tuple[str, ...]:
    """Regular expressions, in source names, of the modules inside blocks that hold matrices and stay
    dense."""
    quantized = {linear.name for linear in skeleton.linears}
    fused = {module.name for module in skeleton.experts.experts}
    inside = tuple(f"{block}." for block in skeleton.blocks)
    patterns: dict[str, None] = dict.fromkeys(_dense_experts(skeleton, quantized))
    for name, module in skeleton.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if (
            name in quantized
            or name in fused
            or not name.startswith(inside)
            or all(p.ndim < 2 for p in own.values())
        ):
            continue
        sources = [
            source
            for leaf in own
            if (origin := skeleton.keys.origins.get(f"{name}.{leaf}")) is not None
            for source in origin.sources
        ]
        common = _common_parent(sources) if sources else name
        patterns[_pattern(common)] = None
    return tuple(patterns)


def _dense_experts(skeleton: Skeleton, quantized: Set[str]) -> Iterator[str]:
    """Patterns of the parameters of experts that stay dense though they could be quantized."""
    for module in skeleton.experts.experts:
        for tensor in module.tensors:
            origin = skeleton.keys.origins.get(f"{module.name}.{tensor.leaf}")
            if origin is not None and not any(name in quantized for name in module.linears_of(tensor)):
                yield from (_pattern(source.removesuffix(".weight")) for source in origin.sources)


def _pattern(name: str) -> str:
    """A regular expression that matches the likes of `name` in all blocks, and all below them."""
    folded = re.escape(fold(name)).replace(r"\*", r"\d+")
    return rf"{folded}(\..*)?$"


def _common_parent(names: Sequence[str]) -> str:
    """The dotted components that all names begin with, without their last one."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join(parts[0][:shared])


def modules_in_block(skeleton: Skeleton) -> tuple[str, ...]:
    """Names inside a block of the quantized linears, if some linear of a block stays dense; otherwise ()."""
    quantized = {linear.name for linear in skeleton.linears}
    partly = any(
        is_linear(module) and f"{block}.{name}" not in quantized
        for block in skeleton.blocks
        for name, module in skeleton.model.get_submodule(block).named_modules()
    )
    if not partly:
        return ()
    return tuple(dict.fromkeys(_inside_block(x) for x in skeleton.linears))


def _inside_block(linear: LinearInfo) -> str:
    """The linear's name inside its block; that of an expert as the files call it."""
    inside = linear.name.removeprefix(f"{linear.block}.")
    _, found, after = linear.stored_as.partition(f".{linear.block.rpartition('.')[2]}.")
    return after if found else inside
