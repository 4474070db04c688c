"""A loaded model saves the checkpoint it was loaded from, and counts the parameters of its packed linears."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptq_cli
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.errors import CheckpointError, ConfigError
from gptq_cli.inference.load import resident_bytes
from tests.checkpoint.checkpoints import Recipe, dense_copy, quantize_directory
from tests.conftest import TinyFactory
from tests.inference.test_load import close_logits, load, logits


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    return tmp_path / "q"


def names(path: Path) -> set[str]:
    return {found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file()}


def test_what_is_saved_is_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "notes.txt").write_text("not of the checkpoint")
    model = gptq_cli.load(str(checkpoint), device_map="cpu")
    model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)
    model.save_pretrained(tmp_path / "new" / "copy")
    copied = tmp_path / "new" / "copy"
    assert names(copied) == names(checkpoint) - {"notes.txt"}
    assert names(tmp_path / "new") == {f"copy/{name}" for name in names(copied)}, "nothing is left beside it"
    for name in names(copied):
        assert (copied / name).read_bytes() == (checkpoint / name).read_bytes()
    assert "quantization_config" in json.loads((copied / "config.json").read_text())
    again = gptq_cli.load(str(copied), device_map="cpu")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(str(tmp_path / "third"))
    assert names(tmp_path / "third") == names(copied)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "gpt2", "qwen3_moe", "mixtral", "opt"])
def test_parameters_are_those_of_the_dense_model(name: str, tiny: TinyFactory, tmp_path: Path) -> None:
    weights = quantize_directory(tiny(name), tmp_path / "q", Recipe(group_size=32), transposed=name == "gpt2")
    model = load(tmp_path / "q")
    dense = dense_copy(tiny(name), weights, torch.float32, transposed=name == "gpt2")
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0
    assert model.get_memory_footprint() == resident_bytes(model)


def test_it_is_still_of_its_class(checkpoint: Path) -> None:
    import transformers

    model = load(checkpoint)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_names_and_configs_that_others_do_not_look_for(checkpoint: Path, tmp_path: Path) -> None:
    """AutoGPTQ's file name, and a quantization config that config.json has not."""
    (checkpoint / "model.safetensors").rename(checkpoint / "gptq_model-4bit-32g.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert torch.equal(logits(load(tmp_path / "copy")), logits(model))


@pytest.mark.parametrize("name", ["README.md", "report.json", "quantize_config.json", "tokenizer_x"])
def test_a_link_out_of_the_directory_is_not_followed_into_a_copy(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((checkpoint / "quantize_config.json").read_bytes())
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(secret)
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / name).exists()
    assert torch.equal(logits(load(tmp_path / "copy")), logits(model))


def test_a_tokenizer_that_is_such_a_link_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.json"
    (checkpoint / "tokenizer.json").rename(outside)
    (checkpoint / "tokenizer.json").symlink_to(outside)
    model = load(checkpoint)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link that leads out") as caught:
        model.save_pretrained(tmp_path / "copy")
    assert caught.value.hint is not None
    assert "cp --remove-destination" in caught.value.hint
    assert not (tmp_path / "copy").exists()


def test_shards(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    base, where = "gptq_model-4bit-32g", {}
    for i in range(2):
        file = f"{base}-0000{i + 1}-of-00002.safetensors"
        half = {name: tensors[name] for name in sorted(tensors)[i::2]}
        save_file(half, checkpoint / file)
        where |= dict.fromkeys(half, file)
    (checkpoint / f"{base}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict(sorted(where.items()))
    assert torch.equal(logits(load(tmp_path / "copy")), logits(model))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_under_a_wrong_name_are_set_right(bits: int, tiny_llama: Path, tmp_path: Path) -> None:
    """As after a round trip through Transformers: gptq_v2 zeros under the name gptq."""
    weights = quantize_directory(tiny_llama, tmp_path / "q", Recipe(bits=bits, group_size=32))
    right = load_file(tmp_path / "q" / "model.safetensors")
    other = tmp_path / "v2"
    quantize_directory(tiny_llama, other, Recipe(bits=bits, group_size=32, version="gptq_v2"))
    for name in ("config.json", "quantize_config.json"):
        (other / name).write_bytes((tmp_path / "q" / name).read_bytes())
    model = load(other)
    assert close_logits(logits(model), logits(dense_copy(tiny_llama, weights, torch.float32)), 1e-5)
    model.save_pretrained(tmp_path / "copy")
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert all(torch.equal(copied[name], tensor) for name, tensor in right.items())
    assert verify_checkpoint(tmp_path / "copy").ok


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"state_dict": {}}, "state_dict is dict"),
        ({"push_to_hub": True}, "push_to_hub is True"),
        ({"variant": "fp16"}, "variant is 'fp16'"),
        ({"safe_serialization": False}, "safe_serialization is False"),
        ({"save_original_format": False}, "save_original_format is False"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint is True"),
        ({"max_shard_size": "1KB"}, "max_shard_size is 1KB"),
        ({"max_shard_size": "much"}, "max_shard_size: 'much' is not a size"),
        ({"save_function": print}, "save_function is builtin_function_or_method"),
    ],
)
def test_options_that_cannot_be_kept(
    options: dict[str, Any], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(checkpoint).save_pretrained(tmp_path / "copy", **options)
    assert caught.value.message.startswith(says)
    assert caught.value.hint
    assert not (tmp_path / "copy").exists()


def test_options_that_ask_for_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "copy", safe_serialization=True, max_shard_size="5GB", state_dict=None)
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_uploading_names_the_command(checkpoint: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(checkpoint).push_to_hub("org/name", private=True)
    assert caught.value.hint == f"upload them: hf upload org/name {checkpoint.resolve()}"


def scaled(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def replaced(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(torch.ones(64))


def extended(model: Any) -> None:
    model.model.layers[0].adapter = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (scaled, "lm_head.weight"),
        (replaced, "model.norm.weight"),
        (extended, "model.layers.0.adapter.weight"),
    ],
)
def test_a_model_that_was_changed_is_not_saved(
    change: Any, named: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = load(checkpoint)
    change(model)
    with pytest.raises(CheckpointError, match="was changed after the model was loaded") as caught:
        model.save_pretrained(tmp_path / "copy")
    assert caught.value.message.startswith(named)
    assert not (tmp_path / "copy").exists()


def test_a_model_in_another_dtype_is_the_same_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint).to(torch.bfloat16).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_files_that_were_changed_are_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    (checkpoint / "quantize_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json was changed"):
        model.save_pretrained(tmp_path / "copy")
    assert names(tmp_path) == {f"q/{name}" for name in names(checkpoint)}


def test_the_place_to_save_to(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    model.save_pretrained(checkpoint)  # it is there already
    assert load(checkpoint) is not None
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file; allowed: a directory"):
        model.save_pretrained(tmp_path / "file")
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    model.save_pretrained(used)
    model.save_pretrained(used)
    assert (used / "mine.txt").read_text() == "mine"
    assert torch.equal(logits(load(used)), logits(model))
    (used / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds other weights \(pytorch_model\.bin\)"):
        model.save_pretrained(used)
