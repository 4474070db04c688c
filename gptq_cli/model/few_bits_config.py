"""What a config says of weights that are stored in few bits: which formats, with how many scales.

    quant_method        written by
    fp8                 DeepSeek, Qwen, Mistral, Transformers: weight_block_size, or one scale for each tensor
    fbgemm_fp8          Llama: one scale for each row
    compressed-tensors  llm-compressor: config_groups with a strategy each
    modelopt            NVIDIA ModelOpt: quant_algo, also in hf_quant_config.json alone
    mxfp4               gpt-oss

Whatever is not read here exactly as it was written (another method, integers, a transform that has to be
undone while the model runs) is refused: decoded in another way, the weights would be other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_cli.errors import ModelError
from gptq_cli.model.facts import CodeFormat
from gptq_cli.model.source import read_json

MODELOPT_FILE = "hf_quant_config.json"
ALL = 0
"""In a block: all rows, or all columns."""
MX_COLUMNS, NV_COLUMNS = 32, 16
_MODELOPT: dict[str, tuple[tuple[CodeFormat, tuple[int, int]], ...]] = {
    "FP8": (("fp8", (ALL, ALL)),),
    "FP8_PER_CHANNEL_PER_TOKEN": (("fp8", (1, ALL)),),
    "FP8_PB_WO": (("fp8", (128, 128)),),
    "MXFP8": (("fp8", (1, MX_COLUMNS)),),
    "NVFP4": (("nvfp4", (1, NV_COLUMNS)),),
    "W4A16_NVFP4": (("nvfp4", (1, NV_COLUMNS)),),
    "W4A8_NVFP4_FP8": (("nvfp4", (1, NV_COLUMNS)),),
}
_ROTATED = ("transform_config", "sparsity_config")


class NotDecodableError(Exception):
    """The weights cannot be decoded; the message says why, as a clause. Caught inside `gptq_cli.model`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A format, and the rows and columns that share a scale."""

    format: CodeFormat
    block: tuple[int, int]

    @property
    def words(self) -> str:
        """`fp8, a scale per 128 x 128`."""
        if self.format != "fp8":
            return self.format
        of_what = {(ALL, ALL): "tensor", (1, ALL): "row"}
        return f"fp8, a scale per {of_what.get(self.block, f'{self.block[0]} x {self.block[1]}')}"


def quantization_of(directory: Path, raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization config of config.json or of its text part, or ModelOpt's own file; None without any.

    Raises `ModelError` for one that is not a JSON object.
    """
    text = raw.get("text_config")
    found = raw.get("quantization_config")
    if found is None and isinstance(text, Mapping):
        found = text.get("quantization_config")
    if found is None:
        found = raw.get("compression_config")
    if found is None and (directory / MODELOPT_FILE).is_file():
        found = _modelopt_file(directory)
    if found is not None and not isinstance(found, Mapping):
        raise ModelError(f"{directory}: the quantization config is {found!r:.80}; allowed: an object")
    return found


def _modelopt_file(directory: Path) -> object:
    try:
        content = read_json(directory / MODELOPT_FILE)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: {MODELOPT_FILE} cannot be read: {error}") from error
    inner = content.get("quantization") if isinstance(content, Mapping) else None
    return {"quant_method": "modelopt", **inner} if isinstance(inner, Mapping) else inner


def layouts_of(quantization: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts that weights may have. Raises `NotDecodableError` for what is not decoded here."""
    method = quantization.get("quant_method") or "unknown"
    readers = {
        "fp8": _fine_grained,
        "fbgemm_fp8": _per_row,
        "compressed-tensors": _compressed_tensors,
        "modelopt": _modelopt,
        "modelopt_fp4": _modelopt,
        "mxfp4": _mxfp4,
    }
    reader = readers.get(str(method))
    if reader is None:
        raise NotDecodableError(f"quant_method {method!r:.80}")
    try:
        found = tuple(dict.fromkeys(reader(quantization)))
        if not found:
            raise NotDecodableError("no weights are named")
    except NotDecodableError as error:
        raise NotDecodableError(f"quant_method {str(method)!r}, {error}") from error
    return found


def _fine_grained(config: Mapping[str, Any]) -> Iterator[Layout]:
    scaling = config.get("scale_fmt")
    if scaling not in (None, "float", "ue8m0"):
        raise NotDecodableError(f"scale_fmt {scaling!r:.80}")
    experts = config.get("expert_dtype", "fp8")
    if experts not in (None, "fp8", "fp4"):
        raise NotDecodableError(f"expert_dtype {experts!r:.80}")
    block = config.get("weight_block_size")
    if block is not None:
        yield Layout("fp8", _block(block, "weight_block_size"))
    else:
        yield Layout("fp8", (ALL, ALL))
        yield Layout("fp8", (1, ALL))
        if "weight_block_size" not in config:  # what Transformers takes then
            yield Layout("fp8", (128, 128))
    if experts == "fp4":
        yield Layout("mxfp4", (1, MX_COLUMNS))


def _per_row(config: Mapping[str, Any]) -> Iterator[Layout]:
    yield Layout("fp8", (1, ALL))


def _mxfp4(config: Mapping[str, Any]) -> Iterator[Layout]:
    yield Layout("mxfp4", (1, MX_COLUMNS))


def _modelopt(config: Mapping[str, Any]) -> Iterator[Layout]:
    algorithm = config.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        layers = config.get("quantized_layers")
        if not isinstance(layers, Mapping) or not layers:
            raise NotDecodableError("quant_algo 'MIXED_PRECISION' without quantized_layers")
        for name, layer in layers.items():
            if not isinstance(layer, Mapping):
                raise NotDecodableError(f"quantized_layers has {layer!r:.80} for {name}")
            yield from _modelopt(layer)
        return
    if not isinstance(algorithm, str) or algorithm not in _MODELOPT:
        raise NotDecodableError(f"quant_algo {algorithm!r:.80} (decoded: {', '.join(_MODELOPT)})")
    for form, block in _MODELOPT[algorithm]:
        size = config.get("group_size")
        if form == "nvfp4" and size not in (None, NV_COLUMNS):
            raise NotDecodableError(f"quant_algo {algorithm!r} with group_size {size!r:.80}")
        yield Layout(form, block)


def _compressed_tensors(config: Mapping[str, Any]) -> Iterator[Layout]:
    rotation = rotation_of(config)
    if rotation is not None:
        raise NotDecodableError(f"{rotation}: it has to be undone while the model runs")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise NotDecodableError("no config_groups")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise NotDecodableError(f"{name} without weights")
        yield _scheme(str(name), str(group.get("format") or config.get("format")), weights)


def rotation_of(config: Mapping[str, Any]) -> str | None:
    """The key of a transform of the weights that has to be undone while the model runs; None without any."""
    for name in _ROTATED:
        part = config.get(name)
        if isinstance(part, Mapping) and part.get("format", "") != "dense" and any(part.values()):
            return name
    return None


def _scheme(name: str, form: str, weights: Mapping[str, Any]) -> Layout:
    """One of compressed-tensors' config groups."""
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    what = f"{name}: num_bits {bits}, type {kind!r:.40}, strategy {strategy!r:.40}, format {form!r:.40}"
    if kind != "float" or weights.get("symmetric") is False or form == "dense":
        raise NotDecodableError(what)
    size = weights.get("group_size")
    if bits == 4 and form.startswith("nvfp4") and size in (None, NV_COLUMNS):
        return Layout("nvfp4", (1, NV_COLUMNS))
    if bits == 4 and form.startswith("mxfp4") and size in (None, MX_COLUMNS):
        return Layout("mxfp4", (1, MX_COLUMNS))
    if bits != 8:
        raise NotDecodableError(what)
    if strategy == "tensor":
        return Layout("fp8", (ALL, ALL))
    if strategy == "channel":
        return Layout("fp8", (1, ALL))
    if strategy == "block":
        return Layout("fp8", _block(weights.get("block_structure"), f"{name}: block_structure"))
    if strategy == "group" and isinstance(size, int) and size > 0:
        return Layout("fp8", (1, size))
    raise NotDecodableError(what)


def _block(value: object, name: str) -> tuple[int, int]:
    if isinstance(value, str):  # compressed-tensors once wrote "128x128"
        value = [int(part) if part.isdigit() else part for part in value.split("x")]
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    ):
        return value[0], value[1]
    raise NotDecodableError(f"{name} {value!r:.80}; allowed: two sizes, as [128, 128]")
