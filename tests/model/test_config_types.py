"""config.json with values of another kind: an error that names the field, before anything is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gptq_cli.config import ModelRef
from gptq_cli.errors import ModelError
from gptq_cli.model.config_types import check_types
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import open_skeleton

CASES = [
    ("architectures", 5, "a list of texts"),
    ("architectures", {}, "a list of texts"),
    ("architectures", [5], "a list of texts"),
    ("architectures", [None], "a list of texts"),
    ("architectures", "LlamaForCausalLM", "a list of texts"),
    ("model_type", ["llama"], "a text"),
    ("model_type", 5, "a text"),
    ("model_type", {}, "a text"),
    ("hidden_size", "x", "a whole number"),
    ("hidden_size", [64], "a whole number"),
    ("vocab_size", 1.5, "a whole number"),
    ("sliding_window", "x", "a whole number"),
    ("torch_dtype", 7, "a text"),
    ("dtype", ["float16"], "a text"),
    ("quantization_config", "x", "an object"),
    ("quantization_config", [], "an object"),
    ("text_config", 3, "an object"),
    ("auto_map", ["x"], "an object"),
    ("is_encoder_decoder", "no", "true, false"),
]


@pytest.mark.parametrize(
    ("name", "value", "kind"), CASES, ids=[f"{name}-{value}" for name, value, _ in CASES]
)
def test_a_field_of_another_kind_is_named(
    name: str, value: object, kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {name: value}))
    ref = ModelRef(model=str(tmp_path / "m"))
    with pytest.raises(ModelError, match=f"config.json says {name} = .*; allowed: {kind}"):
        open_skeleton(find_model(ref), ref)


def test_a_text_config_is_checked_as_well() -> None:
    with pytest.raises(ModelError, match=r"text_config\.hidden_size = 'x'"):
        check_types("m", {"text_config": {"hidden_size": "x"}})


def test_null_and_other_fields_are_left_alone() -> None:
    check_types("m", {"architectures": None, "torch_dtype": None, "anything": object()})


def test_long_values_are_cut() -> None:
    with pytest.raises(ModelError) as caught:
        check_types("m", {"architectures": "x" * 10_000})
    assert len(caught.value.message) < 300
