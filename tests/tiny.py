"""Tiny random models of every architecture that the tool must handle, made in a second, the same every time.

`save_tiny("llama", path)` writes what a model hub would serve: config.json, safetensors (in the names that
the hub's own checkpoints use, because Transformers reverses its key conversion on saving), a generation
config and a real byte-level BPE tokenizer. It was trained once, on the help topics of Python 3.11.7, and is
kept beside this file: those of another Python would give other tokens, and every figure in the tests another.

The weights are random but not white: the embedding has low rank plus noise, so the columns of every
Hessian are correlated and GPTQ has something to gain over round-to-nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import PretrainedConfig

from tests.towers import TOWERS, with_towers

VOCAB = 512
HIDDEN = 64
INNER = 128
BOS, EOS = 0, 1
_TOKENIZER = Path(__file__).with_name("tiny_tokenizer.json")


def _make(class_name: str, **fields: Any) -> Callable[[], PretrainedConfig]:
    """A builder of `transformers.<class_name>` with the shared tiny shape where the class knows its names."""

    def build() -> PretrainedConfig:
        common: dict[str, Any] = {
            "vocab_size": VOCAB,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": EOS,
        }
        return getattr(transformers, class_name)(**(common | fields))

    return build


_ROTARY: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GEMMA: dict[str, Any] = _ROTARY | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
_MOE: dict[str, Any] = _ROTARY | {"num_experts_per_tok": 2}

TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _make("LlamaConfig", **_ROTARY | {"num_hidden_layers": 3}),
    "llama_tied": _make("LlamaConfig", **_ROTARY, tie_word_embeddings=True),
    "qwen2": _make("Qwen2Config", **_ROTARY, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3": _make("Qwen3Config", **_ROTARY, head_dim=32, tie_word_embeddings=True),
    "mistral": _make("MistralConfig", **_ROTARY, sliding_window=16),
    "gemma2": _make("Gemma2Config", **_GEMMA),
    "gemma3_text": _make("Gemma3TextConfig", **_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "phi3": _make("Phi3Config", **_ROTARY),
    "gpt2": _make("GPT2Config", n_embd=HIDDEN, n_inner=INNER, n_layer=2, n_head=4, n_positions=512),
    "opt": _make(
        "OPTConfig",
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "gpt_neox": _make(
        "GPTNeoXConfig",
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "falcon": _make(
        "FalconConfig", hidden_size=HIDDEN, ffn_hidden_size=INNER, num_hidden_layers=2, num_attention_heads=4
    ),
    "bloom": _make("BloomConfig", hidden_size=HIDDEN, n_layer=2, n_head=4),
    "olmo2": _make("Olmo2Config", **_ROTARY),
    "starcoder2": _make("Starcoder2Config", **_ROTARY, use_bias=True, sliding_window=16),
    "stablelm": _make("StableLmConfig", **_ROTARY, use_qkv_bias=True),
    "qwen3_moe": _make(
        "Qwen3MoeConfig", **_MOE, head_dim=32, num_experts=4, moe_intermediate_size=32, mlp_only_layers=[0]
    ),
    "mixtral": _make("MixtralConfig", **_MOE, num_local_experts=4),
}
"""Architecture name -> builder of its tiny config. `llama` has three blocks, the others two."""


def save_tokenizer(path: Path) -> None:
    """Write the tiny tokenizer (tokenizer.json, tokenizer_config.json) into `path`."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(_TOKENIZER)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=512,
    )
    tokenizer.save_pretrained(path)


def randomize(model: transformers.PreTrainedModel, seed: int) -> None:
    """Fill every parameter in place from a local generator: correlated embeddings, unit-gain matrices."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    done: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            if not 2 <= parameter.ndim <= 3:  # norms and biases; kernels of convolutions
                parameter.add_(0.1 * normal(*parameter.shape))
                continue
            if parameter.ndim == 2 and ("embed" in name or "wte" in name or "wpe" in name):
                rank = min(64, max(4, parameter.shape[1] // 8))
                low_rank = (
                    normal(parameter.shape[0], rank) @ normal(rank, parameter.shape[1]) / math.sqrt(rank)
                )
                gain = (
                    0.2
                    if "pos" in name or "wpe" in name
                    else 2 / math.sqrt(parameter.shape[1])
                    if tied
                    else 1.0
                )
                parameter.copy_(gain * (low_rank + 0.3 * normal(*parameter.shape)))
                continue
            fan_in = (
                parameter.shape[0] if "Conv1D" in type(_owner(model, name)).__name__ else parameter.shape[-1]
            )
            parameter.copy_(normal(*parameter.shape) / math.sqrt(fan_in))


def _owner(model: transformers.PreTrainedModel, parameter_name: str) -> torch.nn.Module:
    return model.get_submodule(parameter_name.rpartition(".")[0])


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model itself, in eval mode, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in TOWERS:
            model = with_towers(name)
        else:
            model = transformers.AutoModelForCausalLM.from_config(TINY[name](), dtype=torch.float32)
    randomize(model, seed)
    return (model if dtype == torch.float32 else model.to(dtype)).eval()


def save_tiny(
    name: str, path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, shards: int = 1
) -> Path:
    """Write the tiny model `name` with its tokenizer to `path`, in about `shards` files; return `path`."""
    model = tiny_model(name, seed=seed, dtype=dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = 10 * size if shards == 1 else size // shards + size // (4 * shards)
    model.save_pretrained(path, max_shard_size=limit)
    save_tokenizer(path)
    return path
