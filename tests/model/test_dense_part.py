"""What is in memory beside the blocks: never the weights that are packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptq_cli.config import ModelRef
from gptq_cli.model.dense_part import open_dense_part
from gptq_cli.model.fill import all_tensors
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import Skeleton, open_skeleton
from tests.conftest import TinyFactory
from tests.model.test_experts import model_of

OTHERS = ("gpt_oss", "dbrx", "llama4_text")
"""Experts with biases; in stacks of two dimensions; transposed, all multiplied at once."""
NAMES = ("llama", "llama_tied", "gpt2", "qwen3_moe", "mixtral", *OTHERS)


def opened(tiny: TinyFactory, name: str, folder: Path) -> Skeleton:
    if name in OTHERS:
        model_of(name).save_pretrained(folder)
    ref = ModelRef(model=str(folder if name in OTHERS else tiny(name)))
    return open_skeleton(find_model(ref), ref)


def on_cpu(name: str) -> torch.device:
    return torch.device("cpu")


def on_meta(model: Any) -> set[str]:
    return {name for name, tensor in all_tensors(model) if tensor.is_meta}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_memory(tiny: TinyFactory, name: str, tmp_path: Path) -> None:
    skeleton = opened(tiny, name, tmp_path)
    model = open_dense_part(skeleton, on_cpu)
    assert on_meta(model) == {f"{linear.name}.weight" for linear in skeleton.packed}
    names = dict(model.named_parameters(remove_duplicate=False))
    inside = [n for n, p in names.items() if not p.is_meta and n.startswith(skeleton.blocks_prefix)]
    assert inside, "norms"
    assert all(names[name].ndim < 3 for name in inside)


@pytest.mark.parametrize("name", NAMES)
def test_behind_the_blocks_nothing_of_them_is_in_memory(tiny: TinyFactory, name: str, tmp_path: Path) -> None:
    """The dense model's gradients begin there, and so would the largest moment of a run."""
    skeleton = opened(tiny, name, tmp_path)
    model = open_dense_part(skeleton, on_cpu, behind=True)
    prefix = f"{skeleton.blocks_prefix}."
    assert on_meta(model) == {name for name, _ in all_tensors(model) if name.startswith(prefix)}
    assert not model.get_output_embeddings().weight.is_meta


def test_but_what_is_one_with_a_tensor_outside(tiny: TinyFactory, tmp_path: Path) -> None:
    """The files may hold it under the name in the block alone."""
    skeleton = opened(tiny, "llama", tmp_path)
    inside, outside = "model.layers.0.input_layernorm.weight", "model.norm.weight"
    model = open_dense_part(replace(skeleton, tied=((inside, outside),)), on_cpu, behind=True)
    assert inside not in on_meta(model)
    assert "model.layers.1.input_layernorm.weight" in on_meta(model)


def test_so_with_the_buffers_of_a_block(tmp_path: Path) -> None:
    """A mask of all positions, that no file holds."""
    config = transformers.GPTNeoConfig(
        vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    ref = ModelRef(model=str(tmp_path))
    model = open_dense_part(open_skeleton(find_model(ref), ref), on_cpu, behind=True)
    inside = {name for name, _ in all_tensors(model) if name.startswith("transformer.h.")}
    assert "transformer.h.0.attn.attention.bias" in inside
    assert on_meta(model) == inside
