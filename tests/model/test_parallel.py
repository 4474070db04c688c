"""What tensor parallelism divides: by Transformers' plan where it has one, else by shapes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from gptq_cli.model.facts import HeadCounts
from gptq_cli.model.parallel import find_splits, head_counts

LLAMA = [
    ("model.layers.0.self_attn.q_proj", 64, 64),
    ("model.layers.0.self_attn.k_proj", 64, 32),
    ("model.layers.0.self_attn.v_proj", 64, 32),
    ("model.layers.0.self_attn.o_proj", 64, 64),
    ("model.layers.0.mlp.gate_proj", 64, 128),
    ("model.layers.0.mlp.up_proj", 64, 128),
    ("model.layers.0.mlp.down_proj", 128, 64),
]
ROWS = {"o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "x_proj"}


class Unplanned(PreTrainedConfig):
    """A model that Transformers has no plan for."""

    model_type = "unplanned"
    base_model_tp_plan: Any = None
    hidden_size: int = 64


@pytest.mark.parametrize("config", [LlamaConfig(hidden_size=64), Unplanned()])
def test_llama_by_its_plan_and_by_shapes(config: Any) -> None:
    splits = find_splits(config, LLAMA)
    assert splits == {name: "row" if name.rpartition(".")[2] in ROWS else "column" for name, _, _ in LLAMA}


def test_prefixes_of_a_larger_model_do_not_matter() -> None:
    names = [(name.replace("model.", "model.language_model.", 1), k, n) for name, k, n in LLAMA]
    assert list(find_splits(LlamaConfig(), names).values()) == list(
        find_splits(LlamaConfig(), LLAMA).values()
    )


def test_single_experts() -> None:
    held = [(f"model.layers.0.mlp.experts.3.{n}_proj", 64, 32) for n in ("gate", "up")]
    held.append(("model.layers.0.mlp.experts.3.down_proj", 32, 64))
    assert list(find_splits(Qwen3MoeConfig(hidden_size=64), held).values()) == ["column", "column", "row"]
    mixtral = [("x.experts.0.w1", 64, 32), ("x.experts.0.w2", 32, 64), ("x.experts.0.w3", 64, 32)]
    assert list(find_splits(Unplanned(), mixtral).values()) == ["column", "row", "column"]


def test_low_rank_linears_are_whole() -> None:
    held = [
        ("model.layers.0.self_attn.q_a_proj", 64, 24),
        ("model.layers.0.self_attn.q_b_proj", 24, 96),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", 64, 20),
        ("model.layers.0.self_attn.kv_b_proj", 16, 128),
        ("model.layers.0.self_attn.o_proj", 48, 64),
    ]
    config = DeepseekV3Config(hidden_size=64)
    config.base_model_tp_plan = None
    assert list(find_splits(config, held).values()) == ["whole", "column", "whole", "column", "row"]


def test_mamba_and_neox() -> None:
    mamba = [
        ("backbone.layers.0.mixer.in_proj", 64, 256),
        ("backbone.layers.0.mixer.x_proj", 128, 48),
        ("backbone.layers.0.mixer.dt_proj", 32, 128),
        ("backbone.layers.0.mixer.out_proj", 128, 64),
    ]
    assert list(find_splits(MambaConfig(hidden_size=64), mamba).values()) == [
        "column",
        "row",
        "column",
        "row",
    ]
    neox = [
        ("gpt_neox.layers.0.attention.query_key_value", 64, 192),
        ("gpt_neox.layers.0.attention.dense", 64, 64),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h", 64, 256),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h", 256, 64),
    ]
    config = GPTNeoXConfig(hidden_size=64)
    config.base_model_tp_plan = None
    assert list(find_splits(config, neox).values()) == ["column", "row", "column", "row"]


def test_styles_of_transformers_alone_give_way_to_shapes() -> None:
    """It gathers the outputs of Gated DeltaNet; servers divide out_proj by rows."""
    config = Unplanned()
    config.base_model_tp_plan = {"layers.*.linear_attn.out_proj": "colwise_gather_output"}
    held = [("model.layers.0.linear_attn.out_proj", 96, 64), ("model.layers.0.linear_attn.in_proj_z", 64, 96)]
    assert list(find_splits(config, held).values()) == ["row", "column"]


def test_heads() -> None:
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2)
    assert head_counts(config) == HeadCounts(8, 2)
    config.linear_num_key_heads, config.linear_num_value_heads = 16, 32
    others = (("key heads of linear attention", 16), ("value heads of linear attention", 32))
    assert head_counts(config).others == others
    assert head_counts(Unplanned()) == HeadCounts()
    uneven = Unplanned()
    uneven.num_attention_heads = [12, 16, 20]
    assert head_counts(uneven).queries == 4


class Mixed:
    """A config that refuses to name one number for all layers, as mixed ones of Transformers do."""

    is_heterogeneous = True
    per_layer_config = tuple(
        LlamaConfig(hidden_size=96, num_attention_heads=heads, num_key_value_heads=2) for heads in (12, 8)
    )

    def get_text_config(self) -> Mixed:
        return self

    @property
    def num_attention_heads(self) -> int:
        raise RuntimeError("per-layer attribute")


def test_heads_that_differ_by_layer_are_read_from_each() -> None:
    assert head_counts(Mixed()) == HeadCounts(4, 2)
