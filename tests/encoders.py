"""Models stored in few bits, written here from the definitions of the formats, without the code that decodes.

A small float is encoded by looking for the nearest of all values that its bits can stand for, and those are
computed from sign, exponent and mantissa. `store_in_few_bits` writes two directories: the model in a format,
and the model that it decodes to, saved plainly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def small_float(bits: int, exponent_bits: int, bias: int, nan: tuple[int, ...] = ()) -> np.ndarray:
    """The value of every code: (-1)^s · 2^(e - bias) · (1 + m), or 2^(1 - bias) · m where e is 0."""
    mantissa_bits = bits - 1 - exponent_bits
    values = []
    for code in range(1 << bits):
        sign = -1.0 if code >> (bits - 1) else 1.0
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        size = 2.0 ** (1 - bias) * mantissa if exponent == 0 else 2.0 ** (exponent - bias) * (1 + mantissa)
        values.append(np.nan if code in nan else sign * size)
    return np.array(values)


E4M3 = small_float(8, 4, 7, nan=(0x7F, 0xFF))
E2M1 = small_float(4, 2, 1)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """For each value the code whose value is nearest."""
    known = np.where(np.isnan(table), np.inf, table)
    return np.abs(values[..., None] - known).argmin(-1).astype(np.uint8)


def blocks_of(w: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(largest magnitude of each block, the block's index of every element as row and column indices)."""
    n, k = w.shape
    grid = np.zeros((-(-n // rows), -(-k // columns)))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = w[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            grid[i, j] = np.abs(part).max()
    return grid, np.ix_(np.arange(n) // rows, np.arange(k) // columns)  # type: ignore[return-value]


Parts = dict[str, Tensor]


def as_fp8(codes: np.ndarray) -> Tensor:
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)


def pairs(codes: np.ndarray) -> np.ndarray:
    """Two codes in a byte, the first in the low half."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def f32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def fp8(
    rows: int, columns: int, *, ending: str = "_scale_inv", scale_dtype: torch.dtype = torch.float32
) -> Callable[[str, np.ndarray], tuple[Parts, np.ndarray]]:
    """A scale for each block; 0 rows or columns: for all of them."""

    def encode(name: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
        largest, where = blocks_of(w, rows or w.shape[0], columns or w.shape[1])
        scale = torch.from_numpy(f32(largest / 448)).to(scale_dtype)
        used = scale.float().numpy()
        codes = nearest(w / used[where], E4M3)
        stored = scale.reshape(1) if not rows and not columns else scale
        return {name: as_fp8(codes), name + ending: stored}, f32(E4M3[codes]) * used[where]

    return encode


def mxfp4(name: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
    """compressed-tensors' names; a power of two for each 32 columns."""
    codes, powers, values = mx_codes(w)
    base = name
    return {
        base + "_packed": torch.from_numpy(pairs(codes)),
        base + "_scale": torch.from_numpy(powers),
    }, values


def mx_codes(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, biased exponents, values) of a matrix (N, K)."""
    largest, where = blocks_of(w, 1, 32)
    exponents = np.floor(np.log2(np.maximum(largest, 1e-30))) - 2
    codes = nearest(w / 2.0 ** exponents[where], E2M1)
    return codes, (exponents + 127).astype(np.uint8), f32(E2M1[codes] * 2.0 ** exponents[where])


def mx_experts(name: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
    """gpt-oss: w (experts, K, N); blocks (experts, N, K/32, 16), scales (experts, N, K/32)."""
    blocks, scales, values = [], [], []
    for expert in w:
        codes, powers, decoded = mx_codes(np.ascontiguousarray(expert.T))
        blocks.append(pairs(codes).reshape(codes.shape[0], -1, 16))
        scales.append(powers)
        values.append(decoded.T)
    parts = {
        name + "_blocks": torch.from_numpy(np.stack(blocks)),
        name + "_scales": torch.from_numpy(np.stack(scales)),
    }
    return parts, np.stack(values)


def nvfp4(*, modelopt: bool) -> Callable[[str, np.ndarray], tuple[Parts, np.ndarray]]:
    """A scale in e4m3 for each 16 columns, and one for the tensor: a factor (ModelOpt), or a divisor."""

    def encode(name: str, w: np.ndarray) -> tuple[Parts, np.ndarray]:
        largest, where = blocks_of(w, 1, 16)
        whole = np.float32(largest.max() / (6 * 448))
        if not modelopt:
            divisor = np.float32(1) / whole
        scale_codes = nearest(largest / 6 / whole, E4M3)
        each = f32(E4M3[scale_codes])
        each = each * whole if modelopt else each / divisor
        codes = nearest(w / each[where], E2M1)
        packed, scale = torch.from_numpy(pairs(codes)), as_fp8(scale_codes)
        if modelopt:
            parts = {name: packed, name + "_scale": scale, name + "_scale_2": torch.tensor(whole)}
        else:
            parts = {
                name + "_packed": packed,
                name + "_scale": scale,
                name + "_global_scale": torch.tensor([divisor]),
            }
        return parts, f32(E2M1[codes]) * each[where]

    return encode


def compressed(strategy: str, form: str, bits: int = 8, **weights: Any) -> dict[str, Any]:
    """A config of compressed-tensors with one group."""
    scheme = {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


@dataclass(frozen=True)
class Style:
    """A way to store a model."""

    config: Mapping[str, Any]
    linear: Callable[[str, np.ndarray], tuple[Parts, np.ndarray]]
    file: str = "config.json"
    experts: Callable[[str, np.ndarray], tuple[Parts, np.ndarray]] | None = None
    """For fused experts; then nothing else is stored in few bits."""
    also: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Ending of a weight's name -> a tensor that stands beside it."""
    head: bool = False


STYLES: dict[str, Style] = {
    "fp8-blocks": Style(
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [48, 40],
            "modules_to_not_convert": ["lm_head", "mlp.gate"],
        },
        fp8(48, 40),
    ),
    "fp8-blocks-bf16-scales": Style(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        fp8(128, 128, scale_dtype=torch.bfloat16),
    ),
    "fp8-tensor-static": Style(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        fp8(0, 0, ending="_scale"),
        also={".input_scale": lambda: torch.tensor(0.5), ".k_scale": lambda: torch.tensor([0.25])},
        head=True,
    ),
    "fbgemm": Style(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8(1, 0, ending="_scale")
    ),
    "compressed-tensor": Style(compressed("tensor", "float-quantized"), fp8(0, 0, ending="_scale")),
    "compressed-channel": Style(
        compressed("channel", "float-quantized"), fp8(1, 0, ending="_scale", scale_dtype=torch.bfloat16)
    ),
    "compressed-block": Style(
        compressed("block", "float-quantized", block_structure=[48, 40]), fp8(48, 40, ending="_scale")
    ),
    "compressed-nvfp4": Style(
        compressed("tensor_group", "nvfp4-pack-quantized", 4, group_size=16),
        nvfp4(modelopt=False),
        also={".input_global_scale": lambda: torch.tensor([3.0])},
    ),
    "compressed-mxfp4": Style(compressed("group", "mxfp4-pack-quantized", 4, group_size=32), mxfp4),
    "modelopt-nvfp4": Style(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {}},
        nvfp4(modelopt=True),
        also={".input_scale": lambda: torch.tensor(0.1)},
    ),
    "modelopt-file": Style(
        {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}},
        nvfp4(modelopt=True),
        file="hf_quant_config.json",
    ),
    "modelopt-fp8": Style(
        {"quant_method": "modelopt", "quant_algo": "FP8"}, fp8(0, 0, ending="_scale"), head=True
    ),
    "mxfp4": Style(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        mxfp4,
        experts=mx_experts,
    ),
}


def _encoder(style: Style, name: str, w: Tensor) -> Any:
    if style.experts is not None:
        return style.experts if w.ndim == 3 else None
    inside = ("layers." in name and name.endswith("proj.weight")) or (style.head and name == "lm_head.weight")
    return style.linear if w.ndim == 2 and inside else None


def store_in_few_bits(plain: Path, folder: Path, style: Style) -> tuple[Path, Path]:
    """Write the model of `plain` in `style`, and the model that it decodes to; return both directories."""
    coded, decoded = folder / "coded", folder / "decoded"
    shutil.copytree(plain, coded)
    shutil.copytree(plain, decoded)
    here: Parts = {}
    there: Parts = {}
    for name, w in load_file(plain / "model.safetensors").items():
        encode = _encoder(style, name, w)
        if encode is None:
            here[name] = there[name] = w
            continue
        parts, values = encode(name, w.float().numpy())
        here |= parts
        there[name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        here |= {name.removesuffix(".weight") + ending: made() for ending, made in style.also.items()}
    save_file(here, coded / "model.safetensors", {"format": "pt"})
    save_file(there, decoded / "model.safetensors", {"format": "pt"})
    if style.file == "config.json":
        config = json.loads((coded / "config.json").read_text())
        config["quantization_config"] = dict(style.config)
        (coded / "config.json").write_text(json.dumps(config))
    else:
        (coded / style.file).write_text(json.dumps(style.config))
    return coded, decoded
