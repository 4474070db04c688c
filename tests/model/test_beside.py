"""The text decoder among other towers: which class, which blocks, what stays beside it, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gptq_cli.checkpoint.declared import declared_dynamic
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig
from gptq_cli.errors import ModelError
from gptq_cli.model.architecture import load_config
from gptq_cli.model.beside import LEFT_OUT, TOWER, UNREACHED, parts_beside
from gptq_cli.model.blocks import find_blocks
from gptq_cli.model.conversion import KeyMap, Origin
from gptq_cli.model.describe import model_facts
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.find import find_model
from gptq_cli.model.model_class import own_class
from gptq_cli.model.positions import positions_of
from gptq_cli.model.text_part import beside_the_text, language_model, text_modules
from gptq_cli.planning.cases import JobCase, Work
from gptq_cli.preflight.rules.modules import surplus_blocks
from tests.checkpoint.unquantized import opened
from tests.conftest import TinyFactory
from tests.towers import TOWERS, VOCAB, with_towers


def on_meta(class_name: str, config: Any) -> Any:
    with torch.device("meta"):
        return getattr(transformers, class_name)._from_config(config)


def config_only(path: Path, config: Any, **changes: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(json.loads(config.to_json_string()) | changes))
    return path


@pytest.mark.parametrize(
    ("kind", "declared", "opens"),
    [
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5", ["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        ("qwen3_5", [], "Qwen3_5ForConditionalGeneration"),
        ("llama4", ["Llama4ForConditionalGeneration"], "Llama4ForConditionalGeneration"),
        ("gemma3", ["Gemma3ForConditionalGeneration"], "AutoModelForCausalLM"),  # which opens the same class
        ("llava", ["LlavaModel"], "LlavaForConditionalGeneration"),
        ("qwen2_audio", [], "Qwen2AudioForConditionalGeneration"),
    ],
)
def test_the_class_is_the_models_own(kind: str, declared: list[str], opens: str, tmp_path: Path) -> None:
    path = config_only(tmp_path / "m", TOWERS[kind](), architectures=declared)
    ref = ModelRef(model=str(path))
    assert own_class(load_config(find_model(ref), ref), trust_remote_code=False).__name__ == opens


def test_a_text_model_is_opened_as_before() -> None:
    config = CONFIG_MAPPING["llama"]()
    assert own_class(config, trust_remote_code=False) is AutoModelForCausalLM


def test_a_tower_larger_than_the_decoder_is_no_decoder() -> None:
    config = TOWERS["llava"]()
    config.vision_config.num_hidden_layers, config.vision_config.hidden_size = 12, 256
    model = on_meta("LlavaForConditionalGeneration", config)
    assert find_blocks(model)[0] == "model.language_model.layers"
    assert list(beside_the_text(model)) == ["model.vision_tower", "model.multi_modal_projector"]


def test_a_tower_inside_the_decoder_is_no_part_of_it() -> None:
    vision = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9, "num_attention_heads": 4}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING["git"](vision_config=vision | {"image_size": 32, "patch_size": 8}, **sizes)
    model = on_meta("GitForCausalLM", config)
    assert find_blocks(model)[0] == "git.encoder.layer"
    assert "git.image_encoder" in beside_the_text(model)
    assert not any("image_encoder" in name for name, _ in text_modules(model))


def test_positions_of_a_tower_do_not_limit_the_text() -> None:
    config = TOWERS["llava"]()
    positions = positions_of(on_meta("LlavaForConditionalGeneration", config), config)
    assert positions is not None
    assert (positions.tokens, positions.fixed) == (512, False)


@pytest.mark.parametrize("name", ["llava", "mllama", "blip-2"])
def test_the_smallest_part_that_generates(name: str) -> None:
    model = with_towers(name)
    part = language_model(model)
    assert (part is model) == (name != "blip-2")
    with torch.no_grad():
        logits = part(input_ids=torch.arange(3, 9).unsqueeze(0), use_cache=False).logits
    assert logits.shape == (1, 6, VOCAB)


@pytest.mark.parametrize("name", TOWERS)
def test_dense_parts_and_patterns(name: str, tiny: TinyFactory) -> None:
    skeleton = opened(tiny(name))
    assert sum(item.share for item in skeleton.dense) + skeleton.quantized_share == pytest.approx(1, abs=0.01)
    assert not any(block.startswith(part.name) for part in skeleton.beside for block in skeleton.blocks)
    patterns = [re.compile(key.removeprefix("-:")) for key in declared_dynamic(skeleton)]
    beside = [source for part in skeleton.beside for source in part.sources if source.endswith(".weight")]
    assert beside
    assert all(any(p.match(source.removesuffix(".weight")) for p in patterns) for source in beside)
    towers = [p for p in patterns if any(p.match(source) for source in beside)]
    assert not any(p.match(linear.source_name) for p in towers for linear in skeleton.linears)


def test_what_only_an_image_reaches_stays_dense(tiny: TinyFactory) -> None:
    skeleton = opened(tiny("mllama"))
    assert skeleton.blocks == ("model.language_model.layers.0", "model.language_model.layers.2")
    (unreached,) = (part for part in skeleton.beside if part.reason == UNREACHED)
    assert unreached.name == "model.language_model.layers.1"


def test_layers_that_the_class_leaves_out() -> None:
    mapped = ("model.layers.0.mlp.up.weight", "model.embed.weight")
    keys = KeyMap(
        origins={name: Origin(name, (name,), converted=False) for name in mapped},
        unexpected=(
            "model.layers.0.mlp.up.mask",  # in a module that the class has
            "model.layers.1.mlp.up.weight",
            "model.layers.1.norm.weight",
            "model.rotary.inv_freq",  # no matrix
            "mtp.fc.weight",
        ),
        missing=(),
    )
    shapes = dict.fromkeys(keys.unexpected, (4, 8)) | {
        "model.rotary.inv_freq": (8,),
        "model.layers.1.norm.weight": (8,),
    }
    tensors = [TensorInfo(name, shape, "float32", 0, "x") for name, shape in shapes.items()]
    parts = parts_beside(torch.nn.Module(), (), keys, tensors)
    assert [(part.name, part.reason, part.parameters) for part in parts] == [
        ("model.layers.1", LEFT_OUT, 40),
        ("mtp", LEFT_OUT, 32),
    ]
    assert TOWER not in {part.reason for part in parts}


def _vision_text(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: CONFIG_MAPPING[kind](**more)


SMALL_IDEFICS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "florence2": (_vision_text("florence2"), "is an encoder-decoder model"),
    "pix2struct": (_vision_text("pix2struct"), "is an encoder-decoder model"),
    "blip-2 around t5": (
        lambda: CONFIG_MAPPING["blip-2"](text_config={"model_type": "t5"}),
        "is an encoder-decoder model",
    ),
    "pi0": (_vision_text("pi0"), "does not generate text"),
    "whisper": (_vision_text("whisper"), "is an encoder-decoder model"),
    "idefics": (_vision_text("idefics", **SMALL_IDEFICS), "does not run on text alone: .*pixel_values"),
    "clip": (_vision_text("clip"), "is not a causal language model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str, tmp_path: Path) -> None:
    build, says = REFUSED[name]
    path = config_only(tmp_path / "m", build())
    with pytest.raises(ModelError, match=says):
        opened(path)


def test_blocks_that_config_json_does_not_count_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    """Layers for multi-token prediction are not: they have tensors that no block has."""
    path = tmp_path / "fewer"
    shutil.copytree(tiny_llama, path)
    config = json.loads((path / "config.json").read_text())
    blocks = config["num_hidden_layers"]
    assert _surplus(path) == []
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert _surplus(path) == [f"model.layers.{number}" for number in range(2, blocks)]
    work = Work(QuantizeConfig(group_size=32), CalibrationConfig())
    (finding,) = surplus_blocks(JobCase(facts=model_facts(opened(path)), work=work))
    assert f"config.json describes 2 blocks, and the files hold {blocks - 2} more" in finding.message
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    (finding,) = surplus_blocks(JobCase(facts=model_facts(opened(path)), work=work))
    assert finding.message.startswith("config.json describes 1 block, and the files hold")
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert "model.layers.2" not in _surplus(path)


def _surplus(path: Path) -> list[str]:
    return [part.name for part in model_facts(opened(path)).beside if part.surplus]
