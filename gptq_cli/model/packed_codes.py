"""Whether the tensors of a model are codes of a finished quantization, when its config is wrong about it.

A config can be wrong both ways. AutoGPTQ kept its own beside config.json, so that packed integers lie under a
config that knows nothing of them; and a model that was merged or dequantized, after QLoRA for instance, often
keeps the config of what it was, over weights that are dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.few_bits_config import MODELOPT_FILE, NotDecodableError, layouts_of, rotation_of
from gptq_cli.model.source import ModelFiles, SourceProblem
from gptq_cli.wording import as_json

_PACKED = (".qweight", ".weight_packed")
"""Endings under which GPTQ, AWQ and compressed-tensors pack several codes into one integer."""
_WORDS = ("int16", "int32", "int64")
_INTEGERS = frozenset({*_WORDS, "int8", "uint8", "uint16", "uint32", "uint64", "bool"})
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_SEEN_IN_FILES = frozenset(
    {
        *("auto-round", "awq", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8", "fp8", "gptq"),
        *("hqq", "intel/auto-round", "modelopt", "modelopt_fp4", "mxfp4", "quanto"),
    }
)
"""Methods whose quantized weights are no floats of 16 bits in the files. With others they may be, and not be
the weights that the model runs with: BitNet rounds its own in every forward."""
_LEFT_OVER = "left-over-config"


def not_decoded(quantization: Mapping[str, Any] | None, tensors: Sequence[TensorInfo]) -> str | None:
    """Why the weights are codes that are not decoded here, in words; None where they are dense or decoded."""
    if quantization is None:
        packed = packed_codes(tensors)
        return f"tensor {packed.name} is {packed.dtype}" if packed is not None else None
    if is_left_over(quantization, tensors):
        return None
    try:
        layouts_of(quantization)
    except NotDecodableError as error:
        return str(error)
    return None


def packed_codes(tensors: Sequence[TensorInfo]) -> TensorInfo | None:
    """The first tensor that is named and stored as packed codes are; None where there is none."""
    return next((t for t in tensors if t.name.endswith(_PACKED) and t.dtype in _WORDS), None)


def is_left_over(quantization: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> bool:
    """Whether the quantization config describes weights that are not there, or nothing: all are dense."""
    method = str(quantization.get("quant_method"))
    return (
        (not quantization or method in _SEEN_IN_FILES)
        and rotation_of(quantization) is None
        and bool(tensors)
        and all(tensor.dtype in _FLOATS or _is_row(tensor) for tensor in tensors)
    )


def _is_row(tensor: TensorInfo) -> bool:
    """A number, or a row of them, such as positions: no weight."""
    return tensor.dtype in _INTEGERS and tensor.shape[:-1] in ((), (1,))


def left_over(source: str, quantization: Mapping[str, Any]) -> SourceProblem:
    """What is said of it."""
    method = as_json(quantization.get("quant_method"))
    says = f"describes a quantization (quant_method {method})" if quantization else "names no quantization"
    return SourceProblem(
        _LEFT_OVER,
        source,
        f"its quantization config {says}, and all its tensors are dense: they are read as they are",
        "where these are the model's own weights, take quantization_config out of config.json (or remove "
        f"{MODELOPT_FILE})",
    )


def is_said_left_over(files: ModelFiles) -> bool:
    """Whether `left_over` was said of these files: their config.json is not to be followed."""
    return any(problem.kind == _LEFT_OVER for problem in files.problems)
