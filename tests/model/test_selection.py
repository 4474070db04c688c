"""Which linears are quantized under which settings, and the reasons of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.describe import model_facts
from gptq_cli.model.selection import changed_settings, select_linears
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.planning.cases import Work
from gptq_cli.preflight.registry import check_quantize
from gptq_cli.results.kept import BY_MODULE, GATES, TOO_SMALL, KeptDense
from tests.checkpoint.unquantized import opened
from tests.conftest import TinyFactory
from tests.model.test_gates import DELTA, SHAPE


def selected(path: Path, **fields: Any) -> Skeleton:
    return select_linears(opened(path), QuantizeConfig.of(**{"group_size": 32, **fields}))


def save(path: Path, class_name: str, **fields: Any) -> Path:
    """A random model of `class_name`, without a tokenizer."""
    config = getattr(transformers, class_name)(**SHAPE | fields)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def leaves(names: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_without_settings_nothing_changes(tiny: TinyFactory) -> None:
    for name in ("llama", "qwen3_moe", "gpt2"):
        skeleton = opened(tiny(name))
        found = select_linears(skeleton, QuantizeConfig(group_size=32))
        assert (found.linears, found.dense, found.head) == (skeleton.linears, skeleton.dense, None)


def test_dense_by_name(tiny_llama: Path) -> None:
    skeleton = selected(tiny_llama, modules=["model.layers.1=dense", "model.layers.1.mlp.up_proj=bits:8"])
    assert {x.name for x in skeleton.linears_of("model.layers.1")} == {"model.layers.1.mlp.up_proj"}
    assert set(skeleton.kept.values()) == {BY_MODULE}
    assert len(skeleton.by_module) == len(skeleton.kept) == 6
    facts = model_facts(skeleton)
    assert KeptDense(
        name="model.layers.1.self_attn.q_proj", reason=BY_MODULE, linears=1, weights=64 * 64
    ) in facts.kept  # fmt: skip
    assert {x.stage for x in facts.by_module if x.name.endswith(("q_proj", "k_proj", "v_proj"))} == {0}
    assert len(facts.linears) == 15
    assert facts.quantized_share == pytest.approx(skeleton.quantized_share)


def test_what_is_dense_in_some_blocks_is_named_with_them(tiny: TinyFactory, tiny_llama: Path) -> None:
    rules = [
        "model.layers.0.mlp.down_proj=dense",
        "model.layers.2.mlp.down_proj=dense",
        "*.*.*.mlp.up_proj=dense",
    ]
    skeleton = selected(tiny_llama, modules=rules)
    assert {(one.name, one.linears) for one in model_facts(skeleton).kept} == {
        ("model.layers.0,2.mlp.down_proj", 2),
        ("model.layers.*.mlp.up_proj", 3),
    }
    dense = {one.name for one in skeleton.dense}
    assert "model.layers.0,2.mlp.down_proj" in dense
    assert "model.layers.*.input_layernorm" in dense
    moe = selected(tiny("mixtral"), modules="model.layers.1.mlp.experts=dense")
    assert [(one.name, one.reason) for one in moe.dense if one.name.endswith("experts")] == [
        ("model.layers.1.mlp.experts", BY_MODULE)
    ]


def test_tensors_of_a_module_whose_linears_are_quantized_are_named_themselves(tmp_path: Path) -> None:
    """`linear_attn` would be said to stay dense."""
    skeleton = selected(save(tmp_path / "m", "Qwen3_5TextConfig", **DELTA))
    dense = {one.name for one in skeleton.dense}
    assert {"model.layers.*.linear_attn.A_log", "model.layers.*.linear_attn.dt_bias"} <= dense
    assert "model.layers.*.linear_attn" not in dense


def test_gates_stay_dense_unless_they_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "m", "Qwen3_5TextConfig", **DELTA)
    skeleton = selected(path)
    assert leaves(skeleton.kept) == {"in_proj_a", "in_proj_b"}
    assert set(skeleton.kept.values()) == {GATES}
    assert {(k.name, k.linears) for k in model_facts(skeleton).kept} == {
        ("model.layers.*.linear_attn.in_proj_a", 3),
        ("model.layers.*.linear_attn.in_proj_b", 3),
    }
    assert leaves(selected(path, modules="model.layers.*=bits:8").kept) == {"in_proj_a", "in_proj_b"}
    named = selected(path, bits=8, modules="model.layers.*.linear_attn.in_proj_a=bits:8")
    assert leaves(named.kept) == {"in_proj_b"}
    assert "in_proj_a" in leaves(x.name for x in named.linears)


def test_what_is_too_small_to_pack_stays_dense_and_what_matters_does_not(tmp_path: Path) -> None:
    odd = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20}
    path = save(tmp_path / "m", "LlamaConfig", **odd)
    skeleton = selected(path, group_size=64)  # k and v have 20 rows; o has 80 columns
    assert leaves(skeleton.kept) == {"k_proj", "v_proj"}
    assert set(skeleton.kept.values()) == {TOO_SMALL}
    assert {"q_proj", "o_proj"} <= leaves(x.name for x in skeleton.linears)
    asked = selected(path, group_size=64, modules="model.layers.*.self_attn.k_proj=bits:8")
    assert leaves(asked.kept) == {"v_proj"}  # 20 rows of 8 bits fill 5 words
    assert leaves(selected(path, bits=8, group_size=64).kept) == set()


def test_a_small_share_may_stay_dense_and_does_not_decide_about_the_group(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 8192, "num_attention_heads": 1, "head_dim": 36}
    path = save(tmp_path / "m", "LlamaConfig", **wide, num_hidden_layers=1)
    skeleton = select_linears(opened(path), QuantizeConfig())  # o_proj: 36 columns, 0.15 % of the block
    assert skeleton.kept == {"model.layers.0.self_attn.o_proj": TOO_SMALL} | {
        f"model.layers.0.self_attn.{name}_proj": TOO_SMALL for name in "qkv"
    }
    facts = model_facts(skeleton)
    assert QuantizeConfig().for_model((x.name, x.in_features) for x in facts.linears).group_size == 128


def test_the_head(tiny: TinyFactory) -> None:
    skeleton = selected(tiny("llama"), quantize_head=True)
    assert skeleton.head is not None
    assert (skeleton.head.name, skeleton.head.source_key, skeleton.head.block) == (
        "lm_head",
        "lm_head.weight",
        "",
    )
    assert (skeleton.head.in_features, skeleton.head.out_features) == (64, 512)
    assert not skeleton.head_is_tied
    assert "lm_head" not in {item.name for item in skeleton.dense}
    assert len(model_facts(skeleton).packed) == 22
    assert selected(tiny("llama"), quantize_head=True, modules="lm_head=dense").head is None


def test_a_tied_head_is_one_more_tensor(tiny: TinyFactory) -> None:
    dense = selected(tiny("llama_tied"))
    skeleton = selected(tiny("llama_tied"), quantize_head=True)
    assert skeleton.head is not None
    assert skeleton.head_is_tied
    assert skeleton.quantized_share == dense.quantized_share
    assert "model.embed_tokens" in {item.name for item in skeleton.dense}
    facts = model_facts(skeleton)
    assert facts.head_is_tied
    assert facts.quantized_share == pytest.approx(skeleton.quantized_share)


def test_settings_that_differ_by_the_names_of_the_files(tiny: TinyFactory) -> None:
    config = QuantizeConfig.of(
        group_size=32, quantize_head=True, modules=["transformer.h.1.mlp.c_fc=bits:8,group:64"]
    )
    skeleton = select_linears(opened(tiny("gpt2")), config)
    facts = model_facts(skeleton)
    settled = config.for_model([(x.name, x.in_features) for x in facts.linears], "lm_head")
    assert changed_settings(skeleton, settled) == {
        "transformer.h.1.mlp.c_fc": {"bits": 8, "group_size": 64},
        "lm_head": {"bits": 8},
    }


def test_small_linears_stay_where_there_are_no_others(tmp_path: Path) -> None:
    """So that preflight names the group that fits; a gate or one that is dense by name is no other."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    path = save(tmp_path, "LlamaConfig", head_dim=8, **sizes)
    for fields in ({}, {"group_size": "auto"}, {"modules": ["model.layers.0.mlp.down_proj=dense"]}):
        skeleton = selected(path, **fields)
        assert skeleton.linears
        assert TOO_SMALL not in skeleton.kept.values()
    config = QuantizeConfig(group_size=32)
    (error,) = [
        f
        for f in check_quantize(model_facts(selected(path)), Work(config, CalibrationConfig())).findings
        if f.level == "error"
    ]
    assert (error.rule, error.hint) == (
        "group-too-large",
        "--group-size 16 (16, 8 divide all; -1: one group per row)",
    )
