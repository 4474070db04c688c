"""Which tensor goes to which place of which file, decided before the first weight is read.

The shapes of packed tensors follow from K, N and the format, so every shard's header, its size and the size
of the checkpoint are known at the start. So the writer can write each tensor to its place as soon as it is
finished, in any order and without keeping a shard in memory, and can reserve disk space before the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptq_cli.checkpoint.format import PART_DTYPES, PackedFormat
from gptq_cli.config import QuantizeConfig
from gptq_cli.model.conversion import natural_key
from gptq_cli.model.facts import TensorInfo, dtype_name
from gptq_cli.model.headers import DTYPES, TORCH_TO_SAFETENSORS, build_header
from gptq_cli.model.skeleton import BiasCut, LinearInfo, Skeleton, main_dtype


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
    target: str = ""
    """The model's tensor that it is, where that is computed from tensors of the source (`source` is the first
    of them); "" where it is the source itself."""

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


def packed_format(quantize: QuantizeConfig, linear: str) -> PackedFormat:
    """The format in which the codes of `linear` are stored."""
    own = quantize.of_linear(linear)
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
    stored, run = main_dtype(skeleton.files), dtype_name(skeleton.dtype)
    files = {tensor.name: tensor for tensor in skeleton.files.tensors}

    def dtype(tensor: TensorInfo) -> str:
        return run if tensor.dtype == stored else tensor.dtype

    replaced = {source for linear in skeleton.packed for source in linear.sources}
    instead: dict[str, list[list[PlannedTensor]]] = {}
    for linear in skeleton.packed:
        instead.setdefault(linear.source_key, []).append(_packed_tensors(linear, quantize))
    for linear in skeleton.packed:
        if (cut := linear.bias_cut) is not None:
            source = files[cut.source_key]
            bias = PlannedTensor(
                f"{linear.source_name}.bias", dtype(source), (linear.out_features,), source, cut
            )
            instead.setdefault(source.name, []).append([bias])
            replaced.add(source.name)
    for target, name in rewritten(skeleton).items():
        origin = skeleton.keys.origins[target]
        source = files[origin.sources[0]]
        shape = tuple(skeleton.model.state_dict()[target].shape)
        part = PlannedTensor(name, dtype(source), shape, source, target=target)
        instead.setdefault(source.name, []).append([part])
        replaced |= {*origin.sources}
    for tensor in sorted(skeleton.files.tensors, key=lambda t: natural_key(t.name)):
        yield from instead.pop(tensor.name, ())
        if tensor.name not in replaced:
            yield [PlannedTensor(tensor.name, dtype(tensor), tensor.shape, tensor)]
    for groups in instead.values():  # of a head whose weight is the embedding's in the source
        yield from groups


def rewritten(skeleton: Skeleton) -> dict[str, str]:
    """Dense tensors of the model that are stored as they are -> their names: those that Transformers computes
    from the same tensors of the files as weights that are packed now, and biases of these."""
    quantized = {linear.name for linear in skeleton.packed}
    packed = {f"{linear.name}.weight" for linear in skeleton.packed} | {
        f"{module.name}.{tensor.leaf}"
        for module in skeleton.experts.experts
        for tensor in module.tensors
        if all(name in quantized for name in module.linears_of(tensor))
    }
    biases = {f"{linear.name}.bias" for linear in skeleton.packed if linear.stored_as}
    origins = skeleton.keys.origins
    used = {id(origins[target]) for target in packed | biases if target in origins}
    return {
        target: name
        for target, name in skeleton.own_names.items()
        if target not in packed and id(origins[target]) in used
    }


def _packed_tensors(linear: LinearInfo, quantize: QuantizeConfig) -> list[PlannedTensor]:
    shapes = packed_format(quantize, linear.name).shapes(linear.in_features, linear.out_features)
    return [
        PlannedTensor(f"{linear.source_name}.{part}", PART_DTYPES[part], shapes[part], None)
        for part in PART_DTYPES
    ]
