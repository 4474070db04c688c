from __future__ import annotations

import pytest

from gptq_cli.placement.names import fold, in_blocks, leaf, owner, parents


def test_parents_go_outwards_and_leave_the_root_out() -> None:
    assert list(parents("model.layers.3.mlp")) == ["model.layers.3", "model.layers", "model"]
    assert list(parents("model")) == []
    assert list(parents("")) == []


def test_a_tensor_of_the_root_is_its_own_owner() -> None:
    assert owner("model.norm.weight") == "model.norm"
    assert owner("scale") == "scale"


def test_leaf() -> None:
    assert leaf("model.layers.3.mlp") == "mlp"
    assert leaf("lm_head") == "lm_head"


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("model.layers.3.mlp", "model.layers.*.mlp"),
        ("model.layers.12", "model.layers.*"),
        ("3.up_proj", "*.up_proj"),
        ("mlp.experts.7.w1.weight", "mlp.experts.*.w1.weight"),
        ("model.layers2.h3x.4d", "model.layers2.h3x.4d"),
        ("a.1.2.b", "a.*.*.b"),
        ("model.layers.0,2-3.mlp", "model.layers.*.mlp"),
    ],
)
def test_fold_replaces_whole_components(name: str, folded: str) -> None:
    assert fold(name) == folded


def test_some_of_the_modules_that_are_alike() -> None:
    some = [(f"model.layers.{n}", f"model.layers.{n}.mlp.experts.5.up") for n in (3, 0, 2)]
    assert in_blocks(some) == "model.layers.0,2-3.mlp.experts.*.up"
    assert in_blocks([*some[:1], ("", "lm_head")]) == "model.layers.3.mlp.experts.*.up, lm_head"
