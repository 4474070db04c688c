"""What the config says of a real skeleton's linears: `dynamic`, and `modules_in_block_to_quantize`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from gptq_cli.checkpoint.declared import block_name, declared_dynamic, modules_in_block
from gptq_cli.checkpoint.dynamic_rules import parse_dynamic
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.checkpoint.target_facts import target_facts
from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import CheckpointError
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.targets.check import check_target
from tests.checkpoint.unquantized import edit, opened, write_checkpoint
from tests.conftest import TinyFactory

TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    """A Qwen3.5 of text, vision tower and draft layer, whose gates stay dense."""
    path = tmp_path_factory.mktemp("hybrid")
    config = Qwen3_5Config(text_config=TEXT, vision_config=VISION)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(path)
    draft = {"mtp.fc.weight": torch.zeros(64, 128), "mtp.layers.0.mlp.up_proj.weight": torch.zeros(128, 64)}
    edit(path, lambda tensors: tensors.update(draft))
    found = opened(path)
    gates = ("in_proj_a", "in_proj_b")
    return replace(found, linears=tuple(x for x in found.linears if not x.name.endswith(gates)))


def matched(dynamic: Mapping[str, Any], name: str) -> bool:
    return any(re.match(key.removeprefix("-:"), name) for key in dynamic)


def test_a_hybrid_with_tower_and_draft_layers(hybrid: Skeleton) -> None:
    dynamic = declared_dynamic(hybrid)
    assert set(dynamic) == {
        r"-:(.*\.)?layers\.\d+\.linear_attn\.(conv1d|in_proj_a|in_proj_b|in_proj_ba)(\..*)?$",
        r"-:(.*\.)?visual(\..*)?$",
        r"-:(.*\.)?mtp(\..*)?$",
    }
    for name in (
        "model.language_model.layers.0.linear_attn.in_proj_b",  # GPTQModel
        "language_model.model.layers.2.linear_attn.in_proj_ba",  # vLLM
        "model.layers.2.linear_attn.in_proj_ba",  # SGLang
        "visual.blocks.0.attn.qkv",
        "model.visual.merger.linear_fc1",
        "mtp.layers.0.mlp.gate_up_proj",
        "mtp.fc",
    ):
        assert matched(dynamic, name), name
    for name in (
        "language_model.model.layers.2.linear_attn.in_proj_qkvz",
        "language_model.model.layers.0.mlp.gate_up_proj",
        "language_model.lm_head",
        *(linear.source_name for linear in hybrid.linears),
    ):
        assert not matched(dynamic, name), name
    # Qwen3.5's draft model in vLLM looks for a key of this kind
    assert any(key.startswith("-:") and "mtp" in key for key in dynamic)


def test_short_names_only_where_nothing_dense_has_them(hybrid: Skeleton) -> None:
    """`mlp.up_proj` is in the name of a draft layer, which vLLM would take for a quantized one."""
    assert modules_in_block(hybrid) == tuple(linear.source_name for linear in hybrid.linears)
    files = replace(
        hybrid.files,
        tensors=tuple(x for x in hybrid.files.tensors if not x.name.startswith(("mtp.", "model.visual."))),
    )
    text = replace(hybrid, files=files, keys=replace(hybrid.keys, unexpected=()))
    assert modules_in_block(text) == (
        "linear_attn.out_proj",
        "linear_attn.in_proj_qkv",
        "linear_attn.in_proj_z",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    )


def test_a_dense_matrix_beside_quantized_linears(tmp_path: Path) -> None:
    """A Mamba mixer holds A_log itself: a pattern for the mixer would cover its linears."""
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)).save_pretrained(
        tmp_path
    )
    skeleton = opened(tmp_path)
    rules = parse_dynamic(declared_dynamic(skeleton), "here")
    assert all(rules.of(linear.source_name) == (False, {}) for linear in skeleton.linears)
    assert rules.of("backbone.layers.1.mixer.dt_proj") == (True, {})


def test_blocks_that_optimum_would_not_find(tmp_path: Path, tiny: TinyFactory) -> None:
    assert block_name(opened(tiny("llama"))) == ""
    assert block_name(opened(tiny("gpt2"))) == ""
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)).save_pretrained(
        tmp_path / "mamba"
    )
    write_checkpoint(opened(tmp_path / "mamba"), tmp_path / "out", QuantizeConfig(group_size=32))
    written = open_checkpoint(tmp_path / "out")
    assert written.config_dict["block_name_to_quantize"] == "backbone.layers"
    said = check_target("transformers", target_facts(written))
    assert "blocks-by-name" not in {finding.rule for finding in said}
    for name in ("config.json", "quantize_config.json"):
        text = (tmp_path / "out" / name).read_text()
        (tmp_path / "out" / name).write_text(text.replace("block_name_to_quantize", "forgotten"))
    said = check_target("transformers", target_facts(open_checkpoint(tmp_path / "out")))
    assert "blocks-by-name" in {finding.rule for finding in said}


def test_settings_of_single_linears_come_back(hybrid: Skeleton) -> None:
    downs = {x.source_name: {"bits": 8} for x in hybrid.linears if x.name.endswith("down_proj")}
    dynamic = declared_dynamic(hybrid, downs)
    assert dynamic[r"+:(.*\.)?layers\.\d+\.mlp\.down_proj(\..*)?$"] == {"bits": 8}
    rules = parse_dynamic(dynamic, "here")
    for linear in hybrid.linears:
        assert rules.of(linear.source_name) == (False, {"bits": 8} if linear.source_name in downs else {})
    assert rules.of("model.visual.blocks.0.mlp.down_proj") == (True, {})


def test_the_first_pattern_wins() -> None:
    rules = parse_dynamic(
        {
            r"^model\.layers\.0\.mlp\.up_proj$": {"bits": 8, "damp_percent": 0.1},
            r"-:.*\.0\.": {},
            r"+:model\.layers\.1\.mlp\.up_proj$": {"group_size": 64, "sym": None},
            r".*\.1\.": {"bits": 3},
            r"^model\.layers\.2\.mlp\.up_proj$": {},
            r".*\.2\.": {"bits": 2},
        },
        "here",
    )
    assert rules.of("model.layers.0.mlp.up_proj") == (False, {"bits": 8})
    assert rules.of("model.layers.0.mlp.down_proj") == (True, {})
    assert rules.of("model.layers.1.mlp.up_proj") == (False, {"group_size": 64})
    assert rules.of("model.layers.1.mlp.down_proj") == (False, {"bits": 3})
    assert rules.of("model.layers.2.mlp.up_proj") == (False, {})
    assert rules.of("model.layers.12.mlp.up_proj") == (False, {})
    assert rules.of("model.layers.2.mlp.up_proj.lora") == (False, {"bits": 2})


def test_thousands_of_names_are_looked_up() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(40) for expert in range(64)
    ]
    dynamic = {f"+:^{re.escape(name)}$": {"bits": 8} for name in names}
    rules = parse_dynamic({**dynamic, "-:.*gate": {}}, "here")
    assert len(rules._others) == 1
    assert all(rules.of(name) == (False, {"bits": 8}) for name in names)
    assert rules.of("model.layers.0.mlp.gate") == (True, {})


@pytest.mark.parametrize("pattern", ["(a+)+b", "(", "a" * 1001])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="here: dynamic has the pattern"):
        parse_dynamic({f"-:{pattern}": {}}, "here")
