"""Where positions end is found on the model itself: as many tokens run, and one more does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from gptq_cli.model.positions import Positions, positions_of, stated_positions

COMMON: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
ROTARY: dict[str, Any] = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
GPT: dict[str, Any] = COMMON | {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 8}),
    "opt": ("OPTConfig", ROTARY | {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "biogpt": ("BioGptConfig", ROTARY),
    "mpt": ("MptConfig", COMMON | {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 24}),
    "llama": ("LlamaConfig", ROTARY),
    "gpt_neox": ("GPTNeoXConfig", ROTARY),
    "bloom": ("BloomConfig", COMMON | {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
}


def build(name: str, **more: Any) -> Any:
    config_class, fields = MODELS[name]
    config = getattr(transformers, config_class)(**fields | more)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "gptj", "opt", "biogpt", "mpt"])
def test_fixed_positions_end_where_the_forward_fails(name: str) -> None:
    model = build(name)
    assert positions_of(model, model.config) == Positions(24, fixed=True)
    with torch.inference_mode():
        model(torch.full((1, 24), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 25), 5))
    with torch.device("meta"):
        assert positions_of(build(name), model.config) == Positions(24, fixed=True)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_rotary_positions_go_on(name: str) -> None:
    model = build(name)
    assert positions_of(model, model.config) == Positions(24, fixed=False)
    with torch.inference_mode():
        model(torch.full((1, 30), 5))


def test_a_bias_by_distance_has_no_end() -> None:
    model = build("bloom")
    assert positions_of(model, model.config) is None


def test_scaled_rotary_positions_reach_as_far_as_they_are_scaled() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 1e4}
    model = build("llama", rope_parameters=yarn)
    assert positions_of(model, model.config) == Positions(96, fixed=False)


@pytest.mark.parametrize(("named", "known"), [(512, 512), (-1, None), (0, None), (None, None), (True, None)])
def test_a_config_may_name_no_number(named: Any, known: int | None) -> None:
    assert stated_positions(SimpleNamespace(max_position_embeddings=named)) == known


def test_xlnet_has_no_limit() -> None:
    assert stated_positions(transformers.XLNetConfig()) is None
