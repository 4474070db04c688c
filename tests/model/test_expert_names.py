"""What experts are called in files: by Transformers' rules, forwards and backwards, or by their place."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import core_model_loading

from gptq_cli.config import ModelRef
from gptq_cli.model.blocks import find_blocks
from gptq_cli.model.conversion import Conversion
from gptq_cli.model.expert_names import ExpertNames, linears_in_part
from gptq_cli.model.experts import FoundExperts, find_experts
from gptq_cli.model.meta import build_meta
from gptq_cli.model.skeleton import as_torch_dtype
from tests.model.test_experts import MODELS

LAYER = "model.layers.1"


def built(name: str) -> tuple[Any, Conversion, FoundExperts]:
    kind, fields = MODELS[name]
    config = getattr(transformers, kind)(**fields)
    model = build_meta(config, ModelRef(model="tiny"), as_torch_dtype("float32"))
    return model, Conversion(model), find_experts(model, find_blocks(model)[1])


def sources(name: str, files: list[str] | None = None) -> dict[str, tuple[str, str]]:
    """Linear -> (its name, the tensor that holds it), of files with these tensors, or with none known."""
    _, conversion, found = built(name)
    keys = conversion.map(files or [])
    named = ExpertNames(conversion, found.experts).sources(keys)
    return {linear: (source.name, source.tensors[0]) for linear, source in named.items()}


@pytest.mark.parametrize(
    ("name", "linear", "merged", "called"),
    [
        ("mixtral", "mlp.experts.3.up_proj", "mlp.experts.gate_up_proj", "block_sparse_moe.experts.3.w3"),
        ("mixtral", "mlp.experts.3.down_proj", "mlp.experts.down_proj", "block_sparse_moe.experts.3.w2"),
        ("qwen3_moe", "mlp.experts.2.up_proj", "mlp.experts.gate_up_proj", "mlp.experts.2.up_proj"),
        ("gpt_oss", "mlp.experts.0.gate_proj", "mlp.experts.gate_up_proj", "mlp.experts.0.gate_proj"),
        (
            "granitemoe",
            "block_sparse_moe.experts.1.down_proj",
            "block_sparse_moe.output_linear.weight",
            "block_sparse_moe.experts.1.down_proj",
        ),
    ],
)
def test_files_that_hold_merged_parameters(name: str, linear: str, merged: str, called: str) -> None:
    model, *_ = built(name)
    files = [f"{LAYER}.{merged}"] if name == "granitemoe" else list(model.state_dict())
    if name == "granitemoe":
        files.append(f"{LAYER}.block_sparse_moe.input_linear.weight")
    found = sources(name, files)[f"{LAYER}.{linear}"]
    assert found == (f"{LAYER}.{called}", f"{LAYER}.{merged}")


def test_names_stand_beside_the_merged_parameter() -> None:
    """Files whose layers have another prefix keep it."""
    files = [f"layers.1.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    found = sources("qwen3_moe", files)[f"{LAYER}.mlp.experts.2.up_proj"]
    assert found == ("layers.1.mlp.experts.2.up_proj", "layers.1.mlp.experts.gate_up_proj")


def test_a_name_leads_back_to_its_linear() -> None:
    for name in MODELS:
        _, conversion, found = built(name)
        names = ExpertNames(conversion, found.experts)
        for linear, source in names.sources(conversion.map([])).items():
            place = names.place(source.name)
            assert place is not None
            assert place.linear == linear == source.place.linear
            assert names.place(f"{source.name}0") is None or name == "jetmoe"


def test_names_that_are_not_experts() -> None:
    _, conversion, found = built("mixtral")
    names = ExpertNames(conversion, found.experts)
    for other in (
        "lm_head",
        f"{LAYER}.self_attn.q_proj",
        f"{LAYER}.block_sparse_moe.experts.4.w1",
        "experts.0",
    ):
        assert names.place(other) is None


def test_a_rule_that_cannot_be_run_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(core_model_loading.MergeModulelist, "reverse_op", property(refuses))
    found = sources("mixtral")
    assert found[f"{LAYER}.mlp.experts.3.up_proj"][0] == f"{LAYER}.mlp.experts.3.up_proj"


def test_files_that_lack_an_expert_name_none() -> None:
    stored = [
        f"{LAYER}.block_sparse_moe.experts.{expert}.{role}.weight"
        for expert in range(4)
        for role in ("w1", "w2", "w3")
    ]
    assert f"{LAYER}.mlp.experts.3.up_proj" in sources("mixtral", stored)
    assert not [name for name in sources("mixtral", stored[:-1]) if name.startswith(LAYER)]


def test_a_parameter_is_quantized_whole_or_not_at_all() -> None:
    _, _, found = built("mixtral")
    every = {name for module in found.experts for name, *_ in module.linears()}
    assert linears_in_part(found, every) == frozenset()
    left = linears_in_part(found, every - {f"{LAYER}.mlp.experts.3.up_proj"})
    assert len(left) == 2 * 4
    assert f"{LAYER}.mlp.experts.0.gate_proj" in left
    assert f"{LAYER}.mlp.experts.0.down_proj" not in left
