"""A tiny random model of every architecture of the installed Transformers, made from its default config.

`tiny_config("qwen3_moe")` shrinks the config that the class itself has by default: widths, heads, experts and
vocabularies by the names of their fields, layers to the fewest that hold every kind of layer, sub-configs the
same way. What a name cannot say stands in `OVERRIDES`, values only: nothing here knows what a model computes.

A new architecture of a later Transformers is therefore tried on the day it appears; where its tiny config
does not build, `tiny_config` raises and the table in docs/architectures.md says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import multimodal, tiny

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Types that `AutoModelForCausalLM` opens."""
WITH_TOWERS = tuple(kind for kind in multimodal.types() if kind not in CAUSAL)
"""Other types that generate text, from images or sound and text."""

_LAYER_COUNTS = "num_hidden_layers n_layer n_layers num_layers num_blocks"
_SIZES: Mapping[str, int] = {
    """max_position_embeddings original_max_position_embeddings n_positions n_ctx context_length max_seq_len
    max_source_positions max_target_positions model_max_length""": 512,
    """intermediate_size intermediate_size_mlp dense_intermediate_size ffn_dim ffn_hidden_size n_inner dff
    dim_ff d_ff d_inner encoder_ffn_dim decoder_ffn_dim feed_forward_size mlp_dim""": 128,
    """hidden_size d_model n_embd embedding_size emb_dim embedding_dim word_embed_proj_dim lru_width
    hidden_dim text_hidden_size attention_hidden_size input_embedding_size
    output_embedding_size backbone_hidden_size
    embed_dim moe_intermediate_size expert_intermediate_size shared_expert_intermediate_size
    shared_experts_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size
    expert_ffn_hidden_size""": 64,
    """hidden_size_per_layer_input laurel_rank q_lora_rank kv_lora_rank o_lora_rank qk_nope_head_dim
    v_head_dim gated_norm_rank hc_lowrank""": 32,
    """qk_rope_head_dim index_head_dim head_dim d_head dim_head head_size swa_head_dim global_head_dim
    attention_head_size linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim
    mamba_headdim kv_channels d_kv""": 16,
    """state_size mamba_d_state ssm_state_size time_step_rank mamba_dt_rank mamba_chunk_size chunk_size
    sliding_window sliding_window_size attention_window_size local_attention window_size attention_chunk_size
    index_topk keep_window_size""": 16,
    "mamba_num_heads mamba_n_heads rotary_dim": 8,
    """num_attention_heads num_heads n_head n_heads swa_num_attention_heads linear_num_heads
    linear_num_value_heads index_n_heads attention_heads encoder_attention_heads decoder_attention_heads
    num_encoder_attention_heads num_decoder_attention_heads n_mamba_heads""": 4,
    "num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts ffn_num_experts": 4,
    """num_key_value_heads num_kv_heads n_kv_heads swa_num_key_value_heads linear_num_key_heads
    num_global_key_value_heads multi_query_group_num num_query_groups""": 2,
    """num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts ffn_top_k
    num_selected_experts""": 2,
    f"{_LAYER_COUNTS} encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth": 2,
    """n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
    first_k_dense_replace num_dense_layers""": 1,
}
"""Names of fields -> the most that a tiny model has of it."""
_LIMITS = {name: size for names, size in _SIZES.items() for name in names.split()}
_DROPPED = frozenset(
    {
        *("model_type", "transformers_version", "architectures", "dtype", "id2label", "label2id"),
        *("rope_parameters", "per_layer_config"),
    }
)
"""Fields that the class works out from the others."""
_SPECIAL = re.compile(r"(eos|pad|cls|sep|mask|decoder_start|forced_eos|forced_bos)_token_id")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = ["linear_attention", "hybrid", "linear_attention"] * 2
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "axk2": {"n_routed_experts": 24},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE | {"mrope_section": [4, 2, 2]}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v32": {"n_routed_experts": 16, "index_n_heads": 2},
    "deepseek_v4": {"n_routed_experts": 32, "hc_mult": 2, "index_n_heads": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16, "mamba_n_heads": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "glm_moe_dsa": {"n_routed_experts": 16, "index_n_heads": 2},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hy_v4": {"num_experts": 16, "n_routed_experts": 16, "hc_mult": 2, "index_n_heads": 2},
    "inkling_text": {"rel_extent": 64},
    "inkling2_text": {"rel_extent": 32, "n_routed_experts": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"qk_head_dim": 48, "head_dim": 16, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp_text": {
        "ple_embed_dim": 64,
        "ngram_vocab_size_base": 512,
        "split_ngram_parts": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "max_position_embeddings": 512,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "xlstm": {"num_heads": 4, "embedding_dim": 64, "hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"router_hidden_size": 16, "num_experts": 16},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "n_mamba_heads": 2,
        "layers_block_type": _HYBRID,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "hybrid_layer_ids": [1, 4],
        "layers_block_type": _HYBRID,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "adapter_rank": 16,
    },
}
"""Model type -> what the names of its fields cannot say."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """The shrunken config. Raises whatever Transformers raises where it makes no sense to it."""
    if model_type in multimodal.types():
        return multimodal.tiny_config(model_type)
    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrunk(kind().to_dict()))


def _shrunk(found: Mapping[str, Any]) -> dict[str, Any]:
    layers = _layers(found)
    result: dict[str, Any] = {}
    for name, value in found.items():
        if name in _DROPPED or value is None:
            continue
        if isinstance(value, Mapping) and "model_type" in value:
            result[name] = _shrunk(value)
        elif isinstance(value, list) and len(value) == layers.count:
            result[name] = _small(name, [value[index] for index in layers.kept])
        elif name in _LAYER_COUNTS.split() and layers.count:
            result[name] = len(layers.kept)
        else:
            result[name] = _small(name, value)
    if "kv_lora_rank" in result:  # latent attention has a key and a value for every query
        result["num_key_value_heads"] = result.get("num_attention_heads", 4)
    return result | OVERRIDES.get(found["model_type"], {})


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if name == "bos_token_id":
            return tiny.BOS
        if _SPECIAL.fullmatch(name):
            return tiny.EOS
        if name.startswith("vocab_size") or name.endswith("_vocab_size"):
            return tiny.VOCAB
        return min(value, _LIMITS.get(name, value))
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [min(item, _LIMITS.get(name, item)) for item in value]
    return value


class _Layers:
    """The layers of a default config, and which of them a tiny model keeps: the first of each kind, at most
    four, and at least two layers in all."""

    def __init__(self, count: int, lists: Sequence[Sequence[Any]]) -> None:
        self.count = count
        first: dict[tuple[str, ...], int] = {}
        for index in range(count):
            first.setdefault(tuple(repr(values[index]) for values in lists), index)
        kept = sorted(first.values())[:4]
        more = [index for index in range(count) if index not in kept]
        self.kept = tuple(sorted([*kept, *more[: max(0, 2 - len(kept))]]))


def _layers(found: Mapping[str, Any]) -> _Layers:
    counts = [found[name] for name in _LAYER_COUNTS.split() if isinstance(found.get(name), int)]
    count = next(filter(None, counts), 0)
    return _Layers(
        count, [value for value in found.values() if isinstance(value, list) and len(value) == count]
    )


def model_class(model_type: str) -> Any:
    """The class of the model: with its towers where it has some."""
    names = multimodal.types().get(model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def build(model_type: str, *, seed: int = 0) -> Any:
    """The tiny model with random float32 weights, the same every time."""
    return build_config(model_type, tiny_config(model_type), seed=seed)


def build_config(model_type: str, config: Any, *, seed: int = 0) -> Any:
    """The model of `config` with random float32 weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_type)._from_config(config, dtype=torch.float32)
    tiny.randomize(model, seed)
    return model.eval()
