"""Tiny models with a tower beside the text decoder: for images, video or sound.

The decoder is as wide as the other tiny models, the towers are half as wide, so that a mixed-up one shows.
The names in the files are those of published checkpoints, which Transformers restores when it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

VOCAB, IMAGE = 544, 520
"""Rows of the embedding: the tiny tokenizer's 512 and some for images; the token of an image."""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 8,
}
_MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
_AUDIO: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 16,
}


def _make(kind: str, text: dict[str, Any], **towers: Any) -> Callable[[], PretrainedConfig]:
    def build() -> PretrainedConfig:
        return CONFIG_MAPPING[kind](text_config=_TEXT | text, **towers)

    return build


_IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": 521, "vision_start_token_id": 522}
TOWERS: dict[str, Callable[[], PretrainedConfig]] = {
    "llava": _make(
        "llava",
        {"model_type": "llama"},
        vision_config=_VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=IMAGE,
    ),
    "mistral3": _make(
        "mistral3",
        {"model_type": "mistral"},
        vision_config=_VISION | {"model_type": "pixtral", "head_dim": 8},
        image_token_index=IMAGE,
        spatial_merge_size=2,
    ),
    "internvl": _make(
        "internvl",
        {"model_type": "qwen2"},
        vision_config=_VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=IMAGE,
    ),
    "gemma3": _make(
        "gemma3",
        {"query_pre_attn_scalar": 16, "sliding_window": 16},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=521,
        eoi_token_index=522,
    ),
    "gemma4": _make(
        "gemma4",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCAB,
            "sliding_window": 16,
        },
        vision_config=_VISION | {"head_dim": 8, "num_key_value_heads": 4, "position_embedding_size": 64},
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=521,
        audio_token_id=522,
        boi_token_id=523,
        eoi_token_id=524,
        boa_token_id=525,
        eoa_token_index=526,
    ),
    "qwen2_5_vl": _make(
        "qwen2_5_vl", _MROPE, vision_config=_QWEN_VISION | {"fullatt_block_indexes": [1]}, **_IDS
    ),
    "qwen3_vl": _make(
        "qwen3_vl",
        {},
        vision_config=_QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **_IDS,
    ),
    "qwen3_5": _make(
        "qwen3_5",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        vision_config=_QWEN_VISION | {"num_position_embeddings": 16},
        **_IDS,
    ),
    "glm4v": _make("glm4v", _MROPE, vision_config=_QWEN_VISION | {"image_size": 32}, **_IDS),
    "llama4": _make(
        "llama4",
        {"num_local_experts": 2, "intermediate_size_mlp": 128, "moe_layers": [1], "attention_chunk_size": 64},
        vision_config=_VISION
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        image_token_index=IMAGE,
    ),
    "mllama": _make(
        "mllama",
        {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        vision_config=_VISION
        | {
            "attention_heads": 4,
            "num_global_layers": 1,
            "intermediate_layers_indices": [1],
            "vision_output_dim": 64,
        },
        image_token_index=IMAGE,
    ),
    "blip-2": _make(
        "blip-2",
        {"model_type": "opt", "ffn_dim": 128, "word_embed_proj_dim": 64},
        vision_config=_VISION,
        qformer_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "encoder_hidden_size": 32,
        },
        num_query_tokens=4,
        image_token_index=IMAGE,
    ),
    "qwen2_audio": _make(
        "qwen2_audio", {"model_type": "qwen2"}, audio_config=_AUDIO, audio_token_index=IMAGE
    ),
}
"""Model type -> builder of its tiny config."""
CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "blip-2": "Blip2ForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
}


def with_towers(name: str) -> Any:
    """The model of its own class, in float32, with Transformers' random weights."""
    return getattr(transformers, CLASSES[name])._from_config(TOWERS[name](), dtype=torch.float32)
