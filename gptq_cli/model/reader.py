"""Opening a GPTQ checkpoint, ours or anyone's: every name, dtype and shape is judged before a value is read.

The checkpoint's config builds the model on the meta device; Transformers' own key rules say which module each
`qweight` belongs to; what does not fit is a `CheckpointError` that names the tensor. Nothing is executed, no
pickle is opened and no shard outside the directory is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gptq_cli.config import DType, ModelRef
from gptq_cli.errors import CheckpointError, ModelError
from gptq_cli.gptq.packing import PackedLinear
from gptq_cli.model.blocks import find_blocks, is_linear, shape
from gptq_cli.model.conversion import Conversion, KeyMap
from gptq_cli.model.formats import CheckpointFormat, PackedFormat, parse_quantization
from gptq_cli.model.skeleton import as_torch_dtype, build_meta, load_config, main_dtype
from gptq_cli.model.source import ModelFiles, SourceProblem, read_json, scan_directory
from gptq_cli.model.tensors import TensorReader
from gptq_cli.placement import TensorInfo

PARTS = ("qweight", "qzeros", "scales", "g_idx")
CONFIG_FILES = ("quantize_config.json", "quant_config.json")
_SCALE_DTYPES = ("float16", "bfloat16", "float32")
_AGREE = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInfo:
    """One quantized linear of a checkpoint."""

    name: str
    """Module in the model; for an expert of a fused tensor: the checkpoint's own name."""
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
    """The quantization dictionary as it stands in the file."""
    format: CheckpointFormat
    model: Any
    files: ModelFiles
    dtype: torch.dtype
    blocks: tuple[str, ...]
    linears: tuple[PackedInfo, ...]
    """Quantized linears with a module of their own, in model order."""
    experts: tuple[PackedInfo, ...]
    """Quantized experts that the model fuses into 3-D tensors."""
    conversion: Conversion
    keys: KeyMap
    """Origins of the model's tensors; a quantized weight stands as `<source_name>.weight`."""
    notes: tuple[str, ...]

    @property
    def bits(self) -> int:
        """Bits of a code (before per-module overrides)."""
        return self.format.base.bits

    @property
    def group_size(self) -> int:
        """Columns of a group, -1 for one group a row."""
        return self.format.base.group_size

    @property
    def sym(self) -> bool:
        """Whether codes are symmetric."""
        return self.format.base.sym

    @property
    def desc_act(self) -> bool:
        """Whether columns were solved by falling activation energy."""
        return self.format.base.desc_act

    @property
    def checkpoint_format(self) -> str:
        """ "gptq" or "gptq_v2"."""
        return self.format.base.checkpoint_format

    @property
    def quantizer(self) -> str:
        """Who wrote it, "" when it does not say."""
        return self.format.quantizer

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All tensors of the files."""
        return self.files.tensors

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self.files.size_bytes

    def reader(self) -> TensorReader:
        """A context manager that reads single tensors by their name in the files."""
        return TensorReader(self.directory, self.files.tensors)


def read_packed(
    reader: TensorReader, info: PackedInfo, device: torch.device | str = "cpu"
) -> tuple[PackedLinear, Tensor | None]:
    """The packed tensors and the bias of one linear, with their values checked.

    A missing g_idx, and one of zeros alone where there are several groups (ExLlama's way to say "none"),
    becomes the trivial one. Raises `CheckpointError` for a g_idx out of range and for scales that are not
    finite.
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
    packed = PackedLinear(
        qweight=reader.get(f"{name}.qweight", device),
        qzeros=reader.get(f"{name}.qzeros", device),
        scales=scales,
        g_idx=g_idx,
    )
    return packed, reader.get(f"{name}.bias", device) if info.bias else None


def trivial_g_idx(info: PackedInfo, device: torch.device | str = "cpu") -> Tensor:
    """Column k belongs to group k // group_size."""
    columns = torch.arange(info.in_features, device=device, dtype=torch.int32)
    return torch.zeros_like(columns) if info.format.group_size == -1 else columns // info.format.group_size


def open_checkpoint(
    path: str | Path, *, trust_remote_code: bool = False, dtype: DType = "auto"
) -> QuantizedCheckpoint:
    """Open the directory `path`. Reads config and heads only. Raises `CheckpointError` and `ModelError`."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"no such directory: {path}", hint="give the directory that `gptq quantize --out` wrote"
        )
    ref = ModelRef(model=str(path), trust_remote_code=trust_remote_code, dtype=dtype)
    raw, form = _read_formats(directory)
    files = scan_directory(directory, any_name=True)
    _raise_for(files.problems)
    config = load_config(files, ref)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    run_dtype = _run_dtype(config, files, dtype)
    model = build_meta(config, ref, run_dtype)
    return _Judge(directory, raw, form, files, config, model, run_dtype).checkpoint()


def _read_formats(directory: Path) -> tuple[Mapping[str, Any], CheckpointFormat]:
    """The quantization dictionary of all files that hold one; they must agree."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name in (*CONFIG_FILES, "config.json"):
        if not (directory / name).is_file():
            continue
        try:
            content = read_json(directory / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        if isinstance(content, Mapping) and name == "config.json":
            content = content.get("quantization_config")
            if content is None:
                continue
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{directory}: the quantization config in {name} is no JSON object")
        found.append((name, content))
    if not found:
        raise CheckpointError(
            f"{directory} is no GPTQ checkpoint: there is neither a quantize_config.json nor a "
            "quantization_config in config.json",
            hint="quantize the model first: gptq quantize MODEL --out DIR",
        )
    parsed = [(name, parse_quantization(content, name)) for name, content in found]
    first, form = parsed[0]
    for name, other in parsed[1:]:
        for key in _AGREE:
            mine, theirs = getattr(form.base, key), getattr(other.base, key)
            if mine != theirs:
                raise CheckpointError(f"{key} is {mine!r} in {first} but {theirs!r} in {name}")
    return found[0][1], form


def _raise_for(problems: tuple[SourceProblem, ...]) -> None:
    serious = [problem for problem in problems if problem.kind not in ("no-tokenizer",)]
    if serious:
        more = f" (and {len(serious) - 1} more problems)" if len(serious) > 1 else ""
        raise CheckpointError(serious[0].message + more, hint=serious[0].hint or None)


def _run_dtype(config: Any, files: ModelFiles, asked: DType) -> torch.dtype:
    if asked != "auto":
        return as_torch_dtype(asked)
    declared = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(declared, str):
        return as_torch_dtype(declared)
    if isinstance(declared, torch.dtype):
        return declared
    parts = tuple(f".{part}" for part in PARTS)
    dense = replace(files, tensors=tuple(t for t in files.tensors if not t.name.endswith(parts)))
    return as_torch_dtype(main_dtype(dense) or "float16")


class _Judge:
    """Matches the tensors of a checkpoint with the model's modules, and collects what does not fit."""

    def __init__(
        self,
        directory: Path,
        raw: Mapping[str, Any],
        form: CheckpointFormat,
        files: ModelFiles,
        config: Any,
        model: Any,
        dtype: torch.dtype,
    ) -> None:
        self.directory, self.raw, self.form, self.files = directory, raw, form, files
        self.config, self.model, self.dtype = config, model, dtype
        self.by_name = {tensor.name: tensor for tensor in files.tensors}
        self.conversion = Conversion(model)
        self.errors: list[str] = []
        self.notes: list[str] = list(form.notes)

    def checkpoint(self) -> QuantizedCheckpoint:
        sources = [name.removesuffix(".qweight") for name in self.by_name if name.endswith(".qweight")]
        self._leftovers(set(sources))
        packed = tuple(info for source in sources if (info := self._packed(source)) is not None)
        companions = {f"{source}.{part}" for source in sources for part in PARTS}
        names = [name for name in self.by_name if name not in companions]
        keys = self.conversion.map([*names, *(f"{source}.weight" for source in sources)])
        self._dense(keys, set(sources))
        if not sources and not self.errors:
            self.errors.append(f"{self.directory} holds no quantized linear (no tensor ends in .qweight)")
        if self.errors:
            more = f" (and {len(self.errors) - 1} more problems)" if len(self.errors) > 1 else ""
            raise CheckpointError(
                self.errors[0] + more, hint="the checkpoint is incomplete or damaged: fetch it again"
            )
        order = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        linears = sorted((i for i in packed if i.fused_into is None), key=lambda info: order[info.name])
        without = sum(not info.has_g_idx for info in packed)
        if without:
            self.notes.append(f"{without} linears have no g_idx: groups are taken in place")
        if keys.unexpected:
            self.notes.append(
                f"{len(keys.unexpected)} tensors that the model has no place for are left unread"
            )
        try:
            blocks = find_blocks(self.model)[1]
        except ModelError:
            blocks = ()
        return QuantizedCheckpoint(
            directory=self.directory,
            config=self.config,
            config_dict=self.raw,
            format=self.form,
            model=self.model,
            files=self.files,
            dtype=self.dtype,
            blocks=blocks,
            linears=tuple(linears),
            experts=tuple(info for info in packed if info.fused_into is not None),
            conversion=self.conversion,
            keys=keys,
            notes=tuple(self.notes),
        )

    def _leftovers(self, sources: set[str]) -> None:
        """Parts of a quantized linear whose qweight is not there."""
        for name in self.by_name:
            owner, _, part = name.rpartition(".")
            if part in ("qzeros", "scales", "g_idx") and owner not in sources:
                self.errors.append(f"tensor {owner}.qweight is missing, but {name} is there")

    def _packed(self, source: str) -> PackedInfo | None:
        target, pattern = self.conversion.target_of(f"{source}.weight")
        form = self.form.of(source)
        if f"{source}.weight" in self.by_name:
            self.errors.append(f"tensor {source}.weight stands beside {source}.qweight")
            return None
        if form is None:
            self.errors.append(f"tensor {source}.qweight is there, but `dynamic` says that {source} is dense")
            return None
        if target is None:
            self.errors.append(f"tensor {source}.qweight belongs to no module of {type(self.model).__name__}")
            return None
        module_name = target.removesuffix(".weight")
        bias = f"{source}.bias" in self.by_name
        if pattern is not None:
            sizes = self._expert_sizes(source, form)
            name, fused, transposed = source, target, False
        else:
            module = self.model.get_submodule(module_name)
            if not is_linear(module):
                self.errors.append(f"tensor {source}.qweight belongs to {module_name}, which is no linear")
                return None
            rows, columns = shape(module)
            sizes, name, fused = (columns, rows), module_name, None
            transposed = tuple(module.weight.shape) != (rows, columns) or type(module).__name__ == "Conv1D"
            if getattr(module, "bias", None) is not None and not bias:
                self.errors.append(f"tensor {source}.bias is missing")
        if sizes is None:
            return None
        info = PackedInfo(
            name=name,
            source_name=source,
            in_features=sizes[0],
            out_features=sizes[1],
            format=form,
            bias=bias,
            has_g_idx=f"{source}.g_idx" in self.by_name,
            transposed=transposed,
            fused_into=fused,
        )
        self._check_parts(info)
        return info

    def _expert_sizes(self, source: str, form: PackedFormat) -> tuple[int, int] | None:
        """(K, N) of an expert, which has no module to ask: from its own tensors."""
        qweight = self.by_name[f"{source}.qweight"]
        g_idx = self.by_name.get(f"{source}.g_idx")
        if len(qweight.shape) != 2:
            self.errors.append(f"tensor {source}.qweight has shape {list(qweight.shape)}; allowed: two sizes")
            return None
        columns = g_idx.shape[0] if g_idx and len(g_idx.shape) == 1 else qweight.shape[0] * 32 // form.bits
        return columns, qweight.shape[1]

    def _check_parts(self, info: PackedInfo) -> None:
        allowed: dict[str, tuple[str, ...]] = {
            "qweight": ("int32",),
            "qzeros": ("int32",),
            "scales": _SCALE_DTYPES,
            "g_idx": ("int32", "int64"),
        }
        for part, wanted in info.format.shapes(info.in_features, info.out_features).items():
            name = f"{info.source_name}.{part}"
            tensor = self.by_name.get(name)
            if tensor is None:
                if part != "g_idx":
                    self.errors.append(f"tensor {name} is missing")
                elif info.format.desc_act and info.groups > 1:
                    self.errors.append(f"tensor {name} is missing, and desc_act needs it")
                continue
            if tensor.dtype not in allowed[part]:
                self.errors.append(
                    f"tensor {name} has dtype {tensor.dtype}; allowed: {', '.join(allowed[part])}"
                )
            if tensor.shape != wanted:
                self.errors.append(
                    f"tensor {name} has shape {list(tensor.shape)}; {info.format.bits} bits with group "
                    f"size {info.format.group_size} need {list(wanted)} for {info.in_features} inputs and "
                    f"{info.out_features} outputs"
                )
        if info.bias and self.by_name[f"{info.source_name}.bias"].shape != (info.out_features,):
            self.errors.append(f"tensor {info.source_name}.bias does not have {info.out_features} values")

    def _dense(self, keys: KeyMap, sources: set[str]) -> None:
        state = self.model.state_dict()
        self.errors += [f"tensor {name} is missing" for name in keys.missing]
        for target in keys.origins:
            source = keys.source_of(target)
            if source is None or source not in self.by_name:
                continue
            found, wanted = self.by_name[source].shape, tuple(state[target].shape)
            if found != wanted and source.rpartition(".")[0] not in sources:
                self.errors.append(
                    f"tensor {source} has shape {list(found)}; config.json asks for {list(wanted)}"
                )


def dense_origins(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, Literal["dense", "experts"]]]:
    """Model tensors that are no packed linear: stored dense, or fused from (partly) quantized experts."""
    packed = {f"{info.name}.weight" for info in checkpoint.linears}
    fused = {info.fused_into for info in checkpoint.experts}
    for target in checkpoint.keys.origins:
        if target not in packed:
            yield target, "experts" if target in fused else "dense"
