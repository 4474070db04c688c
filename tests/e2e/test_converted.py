"""Linears whose weights Transformers computes from other tensors of the files: q, k and v that are one there,
a merged gate and up that is two, stacked experts under other names, experts of which text reaches a half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import architectures
from tests.second_opinion import Examination, examine, save_source


def made(kind: str, tmp_path: Path, config: Any = None, **options: Any) -> tuple[Examination, Path, Path]:
    model = architectures.build(kind) if config is None else architectures.build_config(kind, config)
    source, out = save_source(model, tmp_path), tmp_path / "out"
    found = examine(type(model), source, out, **options)
    assert found.problem == ""
    return found, source, out


def names(directory: Path) -> set[str]:
    return {name for file in directory.glob("*.safetensors") for name in load_file(file)}


def test_one_tensor_that_becomes_three_linears(tmp_path: Path) -> None:
    """With biases, and with one of the three dense: what is left of the tensor is stored by itself."""
    config = architectures.tiny_config("molmo2")
    config.text_config.attention_bias = True
    found, source, out = made(
        "molmo2", tmp_path, config, modules={"model.language_model.layers.*.self_attn.k_proj": "dense"}
    )
    attention = "model.transformer.blocks.1.self_attn"
    stored, before = names(out), names(source)
    assert {f"{attention}.att_proj.weight", f"{attention}.att_proj.bias"} <= before
    assert not any("att_proj" in name for name in stored)
    assert {f"{attention}.{x}.{part}" for x in ("q_proj", "v_proj") for part in ("qweight", "bias")} <= stored
    held = load_file(next(source.glob("*.safetensors")))
    kept = load_file(next(out.glob("*.safetensors")))
    for kind in ("weight", "bias"):
        part = kept[f"{attention}.k_proj.{kind}"]
        rows = config.text_config.num_attention_heads * config.text_config.head_dim
        assert torch.equal(part, held[f"{attention}.att_proj.{kind}"][rows : rows + len(part)])
    linears = {linear.name.rpartition(".")[2] for linear in found.report.linears}
    assert linears == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    dynamic = json.loads((out / "quantize_config.json").read_text())["dynamic"]
    assert any("k_proj" in pattern for pattern in dynamic)


def test_two_tensors_that_become_one_linear(tmp_path: Path) -> None:
    found, source, out = made("minimax_m3_vl", tmp_path)
    shared = "block_sparse_moe.shared_experts"
    assert any(f"{shared}.gate_proj.weight" in name for name in names(source))
    assert not any(f"{shared}.gate_proj" in name for name in names(out))
    assert any(f"{shared}.gate_up_proj.qweight" in name for name in names(out))
    assert found.share >= 0.97


def test_stacked_experts_without_a_rule_for_single_ones(tmp_path: Path) -> None:
    found, _, out = made("step3p7", tmp_path)
    assert found.share >= 0.97
    assert any(name.endswith("mlp.experts.3.gate_proj.qweight") for name in names(out))
    assert not any(".moe.gate_proj" in name for name in names(out))


def test_experts_that_only_images_reach_stay_dense(tmp_path: Path) -> None:
    """Their tensors in the files are those of the experts for text, too."""
    found, _, out = made("ernie4_5_vl_moe", tmp_path)
    assert all(".vision_moe." not in linear.name for linear in found.report.linears)
    assert any(".text_moe.experts.3." in linear.name for linear in found.report.linears)
    (reason,) = {kept.reason for kept in found.report.kept_dense if ".vision_moe.experts" in kept.name}
    assert reason == "text does not reach it"
    vision = [name for name in names(out) if ".vision_moe.experts." in name]
    assert vision
    assert all(name.endswith(("gate_up_proj", "down_proj")) for name in vision)
