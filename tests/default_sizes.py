"""What would be quantized of an architecture at the size that its config class has by default.

The files are hollow (`tests/fabricated.py`): names and shapes, no values, so one of 671 B parameters takes
seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from gptq_cli.config import ModelRef, QuantizeConfig
from gptq_cli.model.describe import model_facts
from gptq_cli.model.facts import can_be_packed
from gptq_cli.model.find import find_model
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.placement.names import fold
from tests.architectures import model_class
from tests.fabricated import fabricate
from tests.shares import block_weights, decoder_lists

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GIVEN: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE | {"mrope_section": [16, 24, 24]}}},
    "dbrx": {
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense"] + ["sparse"] * 31,
            "moe_intermediate_size": 896,
            "num_experts_per_tok": 6,
        }
    },
    "deepseek_v2": {"moe_intermediate_size": 1536},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "glm4v_moe": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [3, 4, 4]}}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True},
    "step3p7": {
        "text_config": {
            "sliding_window": 512,
            "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        }
    },
    "xmod": {"default_language": "en_XX"},
}
"""What the default config of a class lacks, or has in a size that no group fits, much as in published
models."""


@dataclass(frozen=True, kw_only=True)
class DefaultSize:
    """The plan for one architecture."""

    parameters: int
    share: float
    """Quantized part of the two- and three-dimensional weights of decoder blocks that text reaches, 0 to
    1."""
    dense: tuple[tuple[str, str, float], ...]
    """(folded name, reason, part of those weights) of what stays dense there, the largest first; what text
    does not reach is listed beside them."""


def default_size(model_type: str, folder: Path) -> DefaultSize:
    """Raises what Transformers raises where the class has no default, and `ModelError`."""
    config = CONFIG_MAPPING[model_type](**_GIVEN.get(model_type, {}))
    fabricate(config, folder, shards=1, model_class=model_class(model_type))
    ref = ModelRef(model=str(folder))
    settings = QuantizeConfig.of("balanced", group_size="auto")
    skeleton = select_linears(open_skeleton(find_model(ref), ref), settings)
    total = block_weights(skeleton.model, skeleton.blocks, model_facts(skeleton).kept)
    inside = tuple(fold(f"{name}.") for name in decoder_lists(skeleton.model, skeleton.blocks))
    settings = settings.for_model([(x.name, x.in_features) for x in skeleton.linears])
    odd: dict[str, int] = {}
    for linear in skeleton.linears:
        own = settings.of_linear(linear.name)
        if not can_be_packed(linear.in_features, linear.out_features, own.bits, own.group_columns):
            odd[fold(linear.name)] = odd.get(fold(linear.name), 0) + linear.in_features * linear.out_features
    done = sum(linear.in_features * linear.out_features for linear in skeleton.linears) - sum(odd.values())
    dense = [(name, "no group size fits: refused", weights / total) for name, weights in odd.items()] + [
        (item.name, item.reason, item.parameters / total)
        for item in skeleton.dense
        if item.name.startswith(inside) and item.reason != "vector"
    ]
    return DefaultSize(
        parameters=skeleton.parameters,
        share=done / total,
        dense=tuple(sorted(dense, key=lambda item: -item[2])),
    )
