"""Models too large to exist here: a real config.json and safetensors files that are all head and no tensors.

The files have the size that their heads promise, as holes: they take no room on the disk, and reading a
weight from them would give zeros. Everything that is decided before a weight is read works on them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from gptq_cli.model.headers import build_header
from tests.tiny import save_tokenizer

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
LLAMA_70B: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
}


def config_8b() -> PretrainedConfig:
    """Llama 3.1 8B."""
    return transformers.LlamaConfig(**LLAMA_8B)


def config_70b() -> PretrainedConfig:
    """Llama 3.1 70B."""
    return transformers.LlamaConfig(**LLAMA_70B)


def config_moe() -> PretrainedConfig:
    """Qwen3 30B-A3B."""
    return transformers.Qwen3MoeConfig(**QWEN3_30B_A3B)


def fabricate(
    config: PretrainedConfig,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 4,
    model_class: Any = None,
) -> Path:
    """Write config.json, a tokenizer and `shards` hollow safetensors files with an index; return `path`.

    `model_class`: by default the one that `AutoModelForCausalLM` takes.
    """
    path.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    with torch.device("meta"):
        if model_class is None:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = model_class._from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    save_tokenizer(path)
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    word = str(dtype).removeprefix("torch.")
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[index::shards]
        head, places = build_header({name: (word, shapes[name]) for name in mine})
        with (path / file).open("wb") as out:
            out.write(head)
            out.truncate(max(end for _, end in places.values()))
        weight_map |= dict.fromkeys(mine, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def apparent_bytes(path: Path) -> int:
    """What the directory claims to hold."""
    return sum(os.stat(file).st_size for file in path.iterdir())
