"""What is in memory beside the blocks: never the weights that are packed."""

from __future__ import annotations

import pytest
import torch

from gptq_cli.config import ModelRef
from gptq_cli.model.dense_part import open_dense_part
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import Skeleton, open_skeleton
from tests.conftest import TinyFactory


def opened(tiny: TinyFactory, name: str) -> Skeleton:
    ref = ModelRef(model=str(tiny(name)))
    return open_skeleton(find_model(ref), ref)


def on_cpu(name: str) -> torch.device:
    return torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "mixtral"])
def test_what_is_in_memory(tiny: TinyFactory, name: str) -> None:
    skeleton = opened(tiny, name)
    model = open_dense_part(skeleton, on_cpu)
    packed = {f"{linear.name}.weight" for linear in skeleton.packed}
    names = dict(model.named_parameters(remove_duplicate=False))
    assert packed == {name for name, parameter in names.items() if parameter.is_meta}
    inside = [n for n, p in names.items() if not p.is_meta and n.startswith(skeleton.blocks_prefix)]
    numbers = sum(names[name].numel() for name in inside)
    assert inside, "norms"
    assert numbers < 0.05 * sum(x.in_features * x.out_features for x in skeleton.linears)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "mixtral"])
def test_behind_the_blocks_nothing_of_them_is_in_memory(tiny: TinyFactory, name: str) -> None:
    """The dense model's gradients begin there, and so would the largest moment of a run."""
    skeleton = opened(tiny, name)
    model = open_dense_part(skeleton, on_cpu, behind=True)
    prefix = f"{skeleton.blocks_prefix}."
    names = dict(model.named_parameters(remove_duplicate=False))
    assert {n for n, p in names.items() if p.is_meta} == {n for n in names if n.startswith(prefix)}
    assert not model.get_output_embeddings().weight.is_meta
