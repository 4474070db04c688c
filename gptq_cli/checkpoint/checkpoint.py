"""An opened quantized checkpoint; its values are read and checked one linear at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_cli.checkpoint.format import CheckpointFormat, PackedFormat
from gptq_cli.checkpoint.zeros import ZerosTally, read_zeros, store_zeros
from gptq_cli.errors import CheckpointError
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.model.conversion import Conversion, KeyMap
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.source import ModelFiles
from gptq_cli.model.streamed import StreamedReader


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInfo:
    """One quantized linear of a checkpoint."""

    name: str
    """Module in the model, whose experts are linears of their own; where they cannot be: the name in the
    files."""
    source_name: str
    """Name in the files: `<source_name>.qweight` and so on."""
    in_features: int
    out_features: int
    format: PackedFormat
    bias: bool
    """The files hold `<source_name>.bias`."""
    has_g_idx: bool
    transposed: bool
    """The model's module is a Conv1D, which computes x W + b with W stored (K, N)."""
    fused_into: str | None = None
    """The model tensor that this expert is a slice of; None for a linear of its own."""

    @property
    def groups(self) -> int:
        """Groups of columns that share a scale."""
        return self.format.groups(self.in_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedCheckpoint:
    """A checked checkpoint. `model` is a skeleton on the meta device: replace its linears, then fill the
    rest."""

    directory: Path
    config: Any
    """The model's config, without its quantization_config."""
    config_dict: Mapping[str, Any]
    """The quantization dictionary as it is in the file."""
    format: CheckpointFormat
    model: Any
    files: ModelFiles
    dtype: torch.dtype
    blocks: tuple[str, ...]
    linears: tuple[PackedInfo, ...]
    """Quantized linears with a module of their own, in model order."""
    experts: tuple[PackedInfo, ...]
    """Quantized experts that Transformers fuses into 3-D tensors, in model order."""
    dense_experts: Mapping[str, str]
    """3-D parameters in blocks that cannot be computed by linears -> why."""
    conversion: Conversion
    keys: KeyMap
    """Origins of the model's tensors; a quantized weight is listed as `<source_name>.weight`."""
    notes: tuple[str, ...]

    @property
    def bits(self) -> int:
        """Bits of a code (before per-module overrides)."""
        return self.format.base.bits

    @property
    def group_size(self) -> int:
        """Columns per group, -1 for one group per row."""
        return self.format.base.group_size

    @property
    def sym(self) -> bool:
        """Whether codes are symmetric."""
        return self.format.base.sym

    @property
    def desc_act(self) -> bool:
        """Whether columns were solved in order of descending activation energy."""
        return self.format.base.desc_act

    @property
    def checkpoint_format(self) -> str:
        """ "gptq" or "gptq_v2"."""
        return self.format.base.checkpoint_format

    @property
    def quantizer(self) -> str:
        """The tool that wrote it, "" when the files do not say."""
        return self.format.quantizer

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All tensors of the files."""
        return self.files.tensors

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self.files.size_bytes

    def reader(self) -> StreamedReader:
        """A context manager that reads single tensors by their name in the files, and refuses other files."""
        return StreamedReader(self.directory, self.files.tensors, self.files.stamps)


def read_packed(
    reader: StreamedReader,
    info: PackedInfo,
    device: torch.device | str = "cpu",
    tally: ZerosTally | None = None,
) -> tuple[PackedTensors, Tensor | None]:
    """The packed tensors and the bias of one linear, with their values checked.

    A missing g_idx becomes the trivial one, and so does one that is all zero despite several groups
    (ExLlama's way to say "none"). `qzeros` are returned field by field in the format that the config names,
    however they are stored; `tally` counts how they were. Raises `CheckpointError` for a g_idx out of range
    and for scales that are not finite.
    """
    name = info.source_name
    scales = reader.get(f"{name}.scales", device)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"tensor {name}.scales holds values that are not finite")
    trivial = trivial_g_idx(info, device)
    g_idx = reader.get(f"{name}.g_idx", device).to(torch.int32) if info.has_g_idx else trivial
    low, high = (int(value) for value in torch.aminmax(g_idx))
    if low < 0 or high >= info.groups:
        raise CheckpointError(
            f"tensor {name}.g_idx holds group {low if low < 0 else high}; allowed: 0 to {info.groups - 1}"
        )
    if high == 0:
        g_idx = trivial
    qzeros = reader.get(f"{name}.qzeros", device)
    zeros = read_zeros(qzeros, info.format, info.out_features)
    if tally is not None:
        tally.add(info.format.zeros, zeros)
    if zeros.stored != info.format.checkpoint_format:
        qzeros = store_zeros(zeros.values, info.format.bits, info.format.checkpoint_format)
    packed = PackedTensors(
        qweight=reader.get(f"{name}.qweight", device), qzeros=qzeros, scales=scales, g_idx=g_idx
    )
    return packed, reader.get(f"{name}.bias", device) if info.bias else None


def trivial_g_idx(info: PackedInfo, device: torch.device | str = "cpu") -> Tensor:
    """Column k belongs to group k // group_size."""
    columns = torch.arange(info.in_features, device=device, dtype=torch.int32)
    return torch.zeros_like(columns) if info.format.group_size == -1 else columns // info.format.group_size
