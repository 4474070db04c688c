"""A tiny config of every type in which Transformers has a text decoder beside other towers.

`tiny_config(type)` takes the default config of the type and shrinks it, field by field, by the field's name:
widths, layers, experts, vocabulary, token ids. The text decoder is 64 wide, every other tower 32, so that a
mixed-up tower shows. What a name cannot tell stands in `FIELDS`, the only part that knows single types.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

VOCAB, TEXT_VOCAB = 640, 512
"""Rows of the embedding; the tokenizer's ids stay below `TEXT_VOCAB`, ids of images and sounds are above."""
TEXT, OTHER = 64, 32
MAPPINGS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
_OTHER = re.compile(
    r"vision|visual|vit|audio|speech|encoder|image|vq|dac|codec|resampler|qformer|sam|vae|acoustic|semantic|talker|token2wav|protein|diffusion"
)
_KEPT = re.compile(
    r"initializer|rope_theta|eps$|dropout|rate$|theta|base$|scal|num_channels|in_channels|out_channels|spatial_merge|temporal|max_position"
    r"|label|cap$|softcap|pretraining_tp|_per_second|position_id|kernel|stride|padding|version|dtype|chunk_length|alpha|beta|factor|merge"
    r"|num_labels|^channels$|sampling|hop_|window_size|_start|mlp_ratio|threshold|limit|downsampl|upsampl|ratio|expansion|mult$|offset"
)  # fmt: skip
_SIZES: tuple[tuple[str, int, int], ...] = (
    # pattern, value in the text decoder, value elsewhere
    (r"^(num_)?(hidden_)?layers$|^num_hidden_layers$|_num_hidden_layers$|^n_layers?$|^depth$", 2, 2),
    (r"_depth$|(en|de)coder_layers$|^num_layers$|blocks$", 2, 2),
    (r"linear_num_key_heads", 8, 8),
    (r"linear_num_value_heads", 16, 16),
    (r"key_value_heads|kv_heads", 2, 4),
    (r"heads$|^n_head$|_heads$", 8, 4),
    (r"experts_per_tok$|topk$|top_k$|^moe_k$|^moe_topk$", 2, 2),
    (r"^n_group$|^topk_group$|^n_groups$", 1, 1),
    (r"shared_experts$", 1, 1),
    (r"experts$", 4, 4),
    (r"qk_nope_head_dim|v_head_dim|qk_rope_head_dim|rope_head_dim", 16, 8),
    (r"head_dim$|dim_head$|d_kv$|kv_channels$", 16, 8),
    (r"kv_lora_rank|q_lora_rank|lora_rank|laurel_rank|d_rel$", 32, 16),
    (r"intermediate|ffn|mlp_dim|d_ff$|inner", 128, 64),
    (r"patch_size$", 8, 8),
    (r"image_size$|^resolution$", 32, 32),
    (r"^sliding_window$|attention_chunk_size|^sliding_window_size$", 32, 32),
    (r"num_mel_bins|n_mel_bins|input_feat_size|feature_size|mel_dim", 16, 16),
    (r"num_query_tokens|num_latents|n_latents", 4, 4),
    (r"latent_query_num|num_image_tokens|image_seq_length|mm_tokens_per_image", 4, 4),
    (r"^mamba_num_heads$", 8, 8),
    (r"ssm_state_size|state_size", 16, 16),
    (r"hidden|d_model|width|embed_dim|_dim$|^dim$|_size$|output_dim|projection", TEXT, OTHER),
    (r"num_position_embeddings|max_source_positions|max_patches|num_patches", 16, 16),
    (r"pos_emb_(height|width|time)", 8, 8),
)  # fmt: skip
_MROPE = {"text_config.rope_parameters.mrope_section": [2, 3, 3], "text_config.num_attention_heads": 4}
FIELDS: dict[str, dict[str, Any]] = {
    "glm4v": _MROPE,
    "glm46v": _MROPE,
    "glmga": _MROPE,
    "glm_ocr": _MROPE,
    "glm4v_moe": {
        "text_config.rope_parameters.mrope_section": [2, 1, 1],
        "text_config.num_attention_heads": 4,
    },
    "qwen2_vl": _MROPE,
    "qwen2_5_vl": _MROPE,
    "qwen2_5_omni_thinker": _MROPE,
    "paddleocr_vl": _MROPE,
    "qwen2_5_omni": {
        "token2wav_config.bigvgan_config.upsample_initial_channel": 64,
        **{f"thinker_config.{k}": v for k, v in _MROPE.items()},
    },
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 32,
        "talker_config.spatial_merge_size": 2,
        "code2wav_config.decoder_dim": 64,
    },
    "inkling2": {
        "text_config.unpadded_vocab_size": VOCAB,
        "text_config.rel_extent": 32,
        "text_config.n_routed_experts": 24,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 600},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters.mrope_section": [3, 3, 2],
        "text_config.num_attention_heads": 4,
    },
    "kimi_k25": {"text_config.qk_head_dim": 32},
    "mistral4": {"qk_head_dim": 32, "head_dim": 32},
    "mistral_large4": {"text_config.qk_head_dim": 32, "text_config.index_n_heads": 2},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 4,
        "text_config.hc_lowrank": 16,
    },
    "step3p7": {
        "text_config.sliding_window": 32,
        "text_config.rope_parameters.sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "chameleon": {"vocabulary_map": {"<image>": 600, **{f"IMGIMG{chr(65 + i)}Z": 601 + i for i in range(4)}}},
    "emu3": {
        "vocabulary_map": {
            "<|extra_200|>": 599,
            "<image>": 600,
            **{f"<|visual token {i:06d}|>": 601 + i for i in range(4)},
        }
    },
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "granite4_vision": {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "vision_config.hidden_size": 64,
    },
    "glm5_next": {
        "text_config.index_topk": 16,
        "text_config.index_kpool": 4,
        "text_config.index_n_heads": 2,
        "text_config.hc_mult": 2,
        "text_config.n_routed_experts": 32,
    },
    "t5gemma2": {"encoder.text_config.hidden_size": 64},
}
"""Type -> dotted field -> its value, after the rest was shrunk."""


def types() -> dict[str, str]:
    """Model type -> class name, of everything that generates text beside another tower."""
    found: dict[str, str] = {}
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for name in MAPPINGS:
        for kind, cls in getattr(modeling_auto, name, {}).items():
            first = cls if isinstance(cls, str) else cls[0]
            if not (
                kind in causal and "SEQ" in name
            ):  # BART and its like: the decoder alone is the language model
                found.setdefault(kind, first)
    return found


def tiny_config(kind: str) -> Any:
    """The config of `kind`, shrunk."""
    cls = CONFIG_MAPPING[kind]
    whole = cls().to_dict()
    for key, kind_of in getattr(cls, "sub_configs", {}).items():
        if whole.get(key) is None and hasattr(kind_of, "model_type") and kind_of.model_type:
            whole[key] = kind_of().to_dict()  # left out by default: Gemma 4's towers
    ids = iter(range(TEXT_VOCAB, VOCAB))
    shrunk = _shrunk(whole, "", ids)
    for path, value in FIELDS.get(kind, {}).items():
        _set(shrunk, path, value)
    for key in ("transformers_version", "architectures", "model_type"):
        shrunk.pop(key, None)
    return cls(**shrunk)


def _shrunk(config: Mapping[str, Any], path: str, ids: Iterator[int]) -> dict[str, Any]:
    other = bool(_OTHER.search(path))
    layers, new_layers = _layers(config)
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("per_layer_config", "torch_dtype", "dtype"):
            continue
        if isinstance(value, Mapping):
            if any(not isinstance(name, str) for name in value):
                result[key] = dict(value)
            elif key in ("rope_parameters", "rope_scaling"):
                result[key] = _rope(value)
            elif key in ("id2label", "label2id"):
                continue
            else:
                result[key] = _shrunk(value, f"{path}.{key}", ids)
        elif isinstance(value, bool) or not isinstance(value, (int, float, list, tuple)):
            result[key] = value
        elif isinstance(value, (list, tuple)):
            result[key] = _list(key, list(value), layers, new_layers, config)
        elif re.search(r"token_(id|index)s?$|_(id|index)$", key) and "expert" not in key:
            result[key] = value if value < TEXT_VOCAB else next(ids)
        elif key in ("bos", "eos", "pad"):
            result[key] = value
        elif key.startswith("vocab_size"):
            result[key] = VOCAB if value > VOCAB else value
        elif key in (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "depth",
            "decoder_layers",
            "encoder_layers",
        ):
            result[key] = new_layers if value else value
        elif key == "max_position_embeddings":
            result[key] = min(value, 512)
        elif isinstance(value, float) or _KEPT.search(key) or value <= 1:
            result[key] = value
        else:
            if other and re.search(r"out_hidden_size|text_hidden_size|output_dim$|adapter_out|^llm_dim", key):
                result[key] = TEXT
                continue
            if re.search(r"num_key_value_heads", key) and value == config.get("num_attention_heads"):
                result[key] = min(4 if other else 8, value)
                continue
            size = next((o if other else t for p, t, o in _SIZES if re.search(p, key)), value)
            result[key] = min(size, value) if value > 0 else value
    return result


def _layers(config: Mapping[str, Any]) -> tuple[int, int]:
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"):
        old = config.get(key)
        if isinstance(old, int) and not isinstance(old, bool):
            kinds = max(
                (
                    len(dict.fromkeys(map(str, config.get(k) or ())))
                    for k in ("layer_types", "mlp_layer_types", "layers_block_type")
                ),
                default=0,
            )
            return old, min(old, max(2, kinds))
    return 0, 2


def _list(key: str, value: list[Any], layers: int, new: int, config: Mapping[str, Any]) -> list[Any]:
    if layers and len(value) == layers and layers > new:
        if isinstance(value[0], int) and value == list(range(value[0], value[0] + len(value))):
            return list(range(new))
        kinds = list(dict.fromkeys(map(str, value)))
        by_text = {str(item): item for item in value}
        short = [by_text[kind] for kind in kinds][:new]
        return short + [value[0]] * (new - len(short))
    if (
        value
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
        and re.search(r"index|layers|idx", key)
    ):
        if "id" in key.split("_"):
            return value
        return list(dict.fromkeys(min(x, new - 1) for x in value))
    if (
        value
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
        and re.search(r"channels|hidden|dims|embed", key)
    ):
        return [min(x, OTHER) for x in value]
    return value


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            result[key] = _rope(item)
        elif key == "mrope_section" and item:
            total, wanted = sum(item), 8
            parts = [max(1, x * wanted // total) for x in item]
            parts[0] += wanted - sum(parts)
            result[key] = parts
        else:
            result[key] = item
    return result


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    *owners, last = path.split(".")
    for owner in owners:
        config = config.setdefault(owner, {})
    if value is ...:
        config.pop(last, None)
    else:
        config[last] = value
