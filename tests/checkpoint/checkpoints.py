"""GPTQ checkpoints made without the package: round-to-nearest codes, packed bit by bit in numpy.

The reference implementation for everything that `gptq_cli.inference` reads. A test can ask for any bit width,
group size, zero point, format version and column order, and knows the dense weight that the codes represent.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How to quantize in a test."""

    bits: int = 4
    group_size: int = 16
    sym: bool = True
    desc_act: bool = False
    version: str = "gptq"
    scale_dtype: torch.dtype = torch.float16
    g_idx: bool = True
    skip: tuple[str, ...] = ("lm_head",)
    """Parts of names that stay dense."""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    """More fields of the quantization dictionary."""

    def quantization(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "quant_method": "gptq",
            "checkpoint_format": self.version,
            "lm_head": "lm_head" not in self.skip,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["tests:1.0"]},
        } | self.extra


@dataclass(frozen=True)
class Packed:
    """The tensors of a linear and the dense weight (N, K) that they stand for, in float64."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    weight: Tensor
    codes: Tensor
    zeros: Tensor

    def tensors(self, name: str, *, g_idx: bool = True) -> dict[str, Tensor]:
        parts = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}
        if g_idx:
            parts["g_idx"] = self.g_idx
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def pack_slowly(values: np.ndarray, bits: int) -> np.ndarray:
    """(R, C) codes -> (ceil(R * bits / 32), C) int32: bit b of code r is bit r * bits + b of the column."""
    rows, columns = values.shape
    words = np.zeros((-(-rows * bits // 32), columns), dtype=np.uint32)
    for row in range(rows):
        for bit in range(bits):
            word, place = divmod(row * bits + bit, 32)
            words[word] |= ((values[row].astype(np.uint32) >> bit) & 1) << np.uint32(place)
    return words.view(np.int32)


def quantize_slowly(weight: Tensor, recipe: Recipe, seed: int = 0) -> Packed:
    """Round to nearest (N, K) `weight` in groups of the recipe."""
    dense = weight.detach().double().numpy()
    rows, columns = dense.shape
    group = columns if recipe.group_size == -1 else recipe.group_size
    groups = -(-columns // group)
    g_idx = np.arange(columns) // group
    if recipe.desc_act:
        g_idx = g_idx[np.random.default_rng(seed).permutation(columns)]
    top = 2**recipe.bits - 1
    scales = np.zeros((groups, rows))
    zeros = np.full((groups, rows), 2 ** (recipe.bits - 1), dtype=np.int64)
    for g in range(groups):
        part = dense[:, g_idx == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if recipe.sym:
            scale = 2 * np.maximum(-low, high) / top
            scale[::3] *= -1  # negative scales are legal, and readers must not mind
        else:
            scale = (high - low) / top
        scale = torch.from_numpy(np.where(scale == 0, 1e-3, scale)).to(recipe.scale_dtype).double().numpy()
        scales[g] = scale
        if not recipe.sym:
            zeros[g] = np.clip(np.round(-low / scale), 0 if recipe.version == "gptq_v2" else 1, top)
    codes = np.clip(np.round(dense / scales[g_idx].T) + zeros[g_idx].T, 0, top).astype(np.int64)
    stored = zeros - 1 if recipe.version == "gptq" else zeros
    return Packed(
        qweight=torch.from_numpy(pack_slowly(codes.T, recipe.bits)),
        qzeros=torch.from_numpy(pack_slowly(stored.T, recipe.bits).T.copy()),
        scales=torch.from_numpy(scales).to(recipe.scale_dtype),
        g_idx=torch.from_numpy(g_idx.astype(np.int32)),
        weight=torch.from_numpy((codes - zeros[g_idx].T) * scales[g_idx].T),
        codes=torch.from_numpy(codes),
        zeros=torch.from_numpy(zeros),
    )


@lru_cache(maxsize=128)
def _quantized_once(
    data: bytes, shape: torch.Size, dtype: torch.dtype, recipe: Recipe, seed: int
) -> Packed:  # of a weight with these bytes: most tests quantize the same few models
    return quantize_slowly(torch.frombuffer(bytearray(data), dtype=dtype).view(shape), recipe, seed)


def quantize_directory(
    source: Path, target: Path, recipe: Recipe, *, transposed: bool = False
) -> dict[str, Tensor]:
    """Copy dense model `source` to `target`, its block weights quantized; returns name -> (N, K) weight."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith("index.json"):
            shutil.copy(path, target / path.name)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    result: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        if not _is_linear(name, tensor, recipe):
            result[name] = tensor
            continue
        weight = (tensor.t() if transposed else tensor).contiguous()
        data = weight.view(torch.uint8).numpy().tobytes()
        packed = _quantized_once(data, weight.shape, weight.dtype, recipe, index)
        linear = name.removesuffix(".weight")
        result |= packed.tensors(linear, g_idx=recipe.g_idx)
        weights[linear] = packed.weight.clone()
    save_file({name: tensor.contiguous() for name, tensor in result.items()}, target / "model.safetensors")
    write_config(target, recipe)
    return weights


def _is_linear(name: str, tensor: Tensor, recipe: Recipe) -> bool:
    dense = ("embed", "wte", "wpe", "norm", "ln_", "gate.weight", *recipe.skip)
    return name.endswith(".weight") and tensor.ndim == 2 and not any(part in name for part in dense)


def write_config(target: Path, recipe: Recipe) -> None:
    """Write the quantization dictionary into both files that hold it."""
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = recipe.quantization()
    (target / "config.json").write_text(json.dumps(config))
    (target / "quantize_config.json").write_text(json.dumps(recipe.quantization()))


def dense_copy(
    source: Path, weights: dict[str, Tensor], dtype: torch.dtype, *, transposed: bool = False
) -> Any:
    """The dense model of `source` with the quantized `weights` written over its own."""
    import transformers

    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    for name, weight in weights.items():
        tensors[f"{name}.weight"] = (weight.t() if transposed else weight).to(torch.float32).contiguous()
    copy = Path(tempfile.mkdtemp(dir=source.parent)) / "dense_copy"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(tensors, copy / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=dtype)
    return model.eval()
