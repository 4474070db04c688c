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
from transformers.core_model_loading import revert_weight_conversion

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


DEEPSEEK_V3: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
}
FP8_BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
"""As DeepSeek-V3's config.json says that its weights are stored."""


def config_8b() -> PretrainedConfig:
    """Llama 3.1 8B."""
    return transformers.LlamaConfig(**LLAMA_8B)


def config_70b() -> PretrainedConfig:
    """Llama 3.1 70B."""
    return transformers.LlamaConfig(**LLAMA_70B)


def config_671b() -> PretrainedConfig:
    """DeepSeek-V3."""
    return transformers.DeepseekV3Config(**DEEPSEEK_V3)


def fabricate(
    config: PretrainedConfig,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 4,
    model_class: Any = None,
    fp8: bool = False,
) -> Path:
    """Write config.json, a tokenizer and `shards` hollow safetensors files with an index; return `path`.

    `model_class`: by default the one that `AutoModelForCausalLM` takes. `fp8`: the linears of the blocks in
    eight bits with a scale per 128 x 128, and every expert by itself, as DeepSeek stores them.
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
    word = str(dtype).removeprefix("torch.")
    if fp8:
        _add_to_config(path, quantization_config=FP8_BLOCKS)
        tensors = _in_eight_bits(model, word)
    else:
        tensors = {name: (word, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[index::shards]
        head, places = build_header({name: tensors[name] for name in mine})
        with (path / file).open("wb") as out:
            out.write(head)
            out.truncate(max(end for _, end in places.values()))
        weight_map |= dict.fromkeys(mine, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def _add_to_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def _in_eight_bits(model: Any, word: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of every tensor of the files."""
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        shape = tuple(tensor.shape)
        if ".layers." in name and len(shape) == 2 and not name.endswith(".gate.weight"):
            stored[name] = ("float8_e4m3fn", shape)
            blocks = tuple(-(-size // 128) for size in shape)
            stored[f"{name}_scale_inv"] = ("float32", blocks)
        else:
            stored[name] = (word, shape)
    return stored


def apparent_bytes(path: Path) -> int:
    """What the directory claims to hold."""
    return sum(os.stat(file).st_size for file in path.iterdir())
