"""Random quantized checkpoints for tests: written by our own writer, with codes that nobody solved for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gptq_cli.checkpoint.layout import packed_format
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.config import ModelRef, QuantizeConfig
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import LinearInfo, Skeleton, open_skeleton


def opened(path: Path, **fields: Any) -> Skeleton:
    """The skeleton of a model directory."""
    ref = ModelRef(model=str(path), **fields)
    return open_skeleton(find_model(ref), ref)


def random_packed(linear: LinearInfo, quantize: QuantizeConfig, seed: int = 0) -> PackedTensors:
    """Tensors of the right shapes with random words, and the trivial g_idx (a shuffled one with desc_act)."""
    generator = torch.Generator().manual_seed(seed + sum(linear.name.encode()))
    form = packed_format(quantize, linear.name)
    shapes = form.shapes(linear.in_features, linear.out_features)
    K = linear.in_features
    g_idx = torch.arange(K, dtype=torch.int32) // (K if form.group_size == -1 else form.group_size)
    if quantize.desc_act:
        g_idx = g_idx[torch.randperm(K, generator=generator)]
    words = -(2**31), 2**31 - 1
    return PackedTensors(
        qweight=torch.randint(*words, shapes["qweight"], dtype=torch.int32, generator=generator),
        qzeros=torch.randint(*words, shapes["qzeros"], dtype=torch.int32, generator=generator),
        scales=(0.01 * torch.randn(shapes["scales"], generator=generator)).half(),
        g_idx=g_idx,
    )


def write_checkpoint(
    skeleton: Skeleton, out: Path, quantize: QuantizeConfig | None = None, **fields: Any
) -> dict[str, PackedTensors]:
    """Write a complete checkpoint; return the packed tensors, by the linear's name in the model."""
    quantize = quantize or QuantizeConfig(group_size=32)
    packed = {linear.name: random_packed(linear, quantize) for linear in skeleton.packed}
    with CheckpointWriter(out, skeleton, quantize, **fields) as writer:
        for linear in skeleton.packed:
            writer.add_packed(linear, packed[linear.name])
        writer.copy_dense()
        writer.finish({"made": "by a test"})
    return packed


def edit(
    path: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors"
) -> None:
    """Rewrite one shard after `change` worked on its tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / file).items()}
    change(tensors)
    save_file(tensors, path / file, metadata={"format": "pt"})
