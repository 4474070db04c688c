"""Loading: the same numbers as Transformers gives, by either road; damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gptq_cli.config import ModelRef
from gptq_cli.errors import CheckpointError, ModelError, NonFinite
from gptq_cli.model import weights
from gptq_cli.model.conversion import Conversion, natural_key
from gptq_cli.model.fill import fill_dense
from gptq_cli.model.find import find_model
from gptq_cli.model.meta import build_meta
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.streamed import StreamedReader
from gptq_cli.model.weights import check_tensor, load_resident
from gptq_cli.placement.device import Device
from gptq_cli.placement.placement import Placement, PlacementEntry
from tests.checkpoint.unquantized import opened
from tests.conftest import TinyFactory
from tests.tiny import TINY

CPU = torch.device("cpu")


def placed(entries: dict[str, str]) -> Placement:
    devices = {name: Device.parse(text) for name, text in entries.items()}
    return Placement(
        tuple(PlacementEntry(name, device, 0, True) for name, device in devices.items()),
        next(iter(devices.values())),
        "a test",
    )


ON_CPU = placed({"": "cpu"})


def fill(skeleton: Skeleton) -> None:
    with StreamedReader(skeleton.files.directory, skeleton.files.tensors) as reader:
        fill_dense(
            skeleton.model,
            Conversion(skeleton.model),
            skeleton.keys,
            reader.get,
            lambda _: CPU,
            skeleton.dtype,
        )


@pytest.mark.parametrize("name", sorted(TINY))
def test_both_roads_give_the_same_model(name: str, tiny: TinyFactory) -> None:
    path = tiny(name)
    skeleton = opened(path)
    resident = load_resident(skeleton, ON_CPU)
    assert not resident.training
    assert not any(p.requires_grad for p in resident.parameters())
    assert resident.config.use_cache is False
    fill(skeleton)
    filled = skeleton.model
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path)(ids).logits
        assert torch.equal(resident(ids).logits, expected)
        assert torch.equal(filled(ids, use_cache=False).logits, expected)
    mine, theirs = dict(filled.named_buffers()), dict(resident.named_buffers())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    tied = filled.get_output_embeddings().weight is filled.get_input_embeddings().weight
    assert tied == bool(skeleton.tied)


def test_dtype_and_random_state(tiny: TinyFactory) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    skeleton = opened(tiny("llama"), dtype="bfloat16")
    model = load_resident(skeleton, ON_CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    fill(skeleton)
    assert {p.dtype for p in skeleton.model.parameters()} == {torch.bfloat16}
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change(model: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(model / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight(model: Path) -> None:
    change(model, "model.norm.weight", None)
    with pytest.raises(ModelError, match=r"missing keys: model\.norm\.weight"):
        load_resident(opened(model), ON_CPU)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        fill(opened(model))


def test_a_wrong_shape(model: Path) -> None:
    change(model, "model.norm.weight", torch.ones(63))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_resident(opened(model), ON_CPU)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[63\]"):
        fill(opened(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_named(model: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(model / "model.safetensors")[name]
    weight[3, 5] = value
    change(model, name, weight)
    loaded = load_resident(opened(model), ON_CPU)
    with pytest.raises(
        NonFinite, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight .*\(3, 5\)"
    ) as caught:
        check_tensor(name, loaded.get_parameter(name))
    assert caught.value.exit_code == 5
    for other, tensor in loaded.named_parameters():
        if other != name:
            check_tensor(other, tensor)


def test_a_config_that_was_left_over_is_not_followed(tiny_llama: Path, tmp_path: Path) -> None:
    """Transformers would ask for bitsandbytes, or quantize with it where it is there."""
    path = tmp_path / "model"
    shutil.copytree(tiny_llama, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(config))
    model = load_resident(opened(path), ON_CPU)
    expected = load_resident(opened(tiny_llama), ON_CPU).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not model.training


def test_finite_check_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK_ELEMENTS", 7)
    tensor = torch.randn(10, 10, dtype=torch.bfloat16)
    check_tensor("t", tensor)
    tensor[9, 9] = float("nan")
    with pytest.raises(NonFinite, match=r"1 value that is.*\(9, 9\)"):
        check_tensor("t", tensor)
    check_tensor("empty", torch.empty(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_another_dtype_is_no_advice_where_the_files_hold_the_nan(dtype: torch.dtype) -> None:
    with pytest.raises(NonFinite) as caught:
        check_tensor("t", torch.tensor([1.0, float("nan")], dtype=dtype))
    assert ("--dtype" in str(caught.value.hint)) is (dtype == torch.float16)


def names(model: nn.Module) -> Iterable[str]:
    return sorted({*model.state_dict(), *(n for n, _ in model.named_buffers())}, key=natural_key)


def test_device_map_is_not_misread() -> None:
    """Transformers reads "model.layers.1" as a pattern that layer 10 matches, too."""
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=12, num_attention_heads=1, vocab_size=8
    )
    model = build_meta(config, ModelRef(model="x"), torch.float32)
    skeleton: Any = SimpleNamespace(model=model)
    entries = {f"model.layers.{i}": "cuda:0" if i == 1 else "cpu" for i in range(12)}
    entries |= {
        "model.embed_tokens": "cuda:0",
        "model.norm": "cpu",
        "model.rotary_emb": "cuda:0",
        "lm_head": "cpu",
    }
    placement = placed(entries)
    result = weights._device_map(skeleton, placement)
    assert result is not None
    expanded = weights.expand_device_map(result, list(names(model)))
    for name in names(model):
        assert expanded[name] == placement.device_of(name).for_accelerate, name
    assert set(result.values()) == {0, "cpu"}


def test_device_map_entries_that_contain_each_other_are_split() -> None:
    model = nn.Module()
    model.head = nn.Linear(2, 2)
    model.header = nn.Module()
    model.header.inner = nn.Linear(2, 2)
    skeleton: Any = SimpleNamespace(model=model)
    result = weights._device_map(skeleton, placed({"head": "cuda:0", "header": "cuda:1"}))
    assert result is not None
    expanded = weights.expand_device_map(result, list(names(model)))
    assert dict(expanded) == {
        "head.weight": 0,
        "head.bias": 0,
        "header.inner.weight": 1,
        "header.inner.bias": 1,
    }


def test_one_device_needs_no_dispatch() -> None:
    skeleton: Any = SimpleNamespace(model=nn.Linear(2, 2))
    assert weights._device_map(skeleton, ON_CPU) is None
    assert weights._device_map(skeleton, placed({"": "cuda:1"})) == {"": 1}


def test_reader_names_what_it_cannot_find(tiny_llama: Path) -> None:
    files = find_model(ModelRef(model=str(tiny_llama)))
    with StreamedReader(tiny_llama, files.tensors) as reader:
        assert "lm_head.weight" in reader
        with pytest.raises(CheckpointError, match="no tensor nothing"):
            reader.get("nothing")


def test_values_that_are_not_finite_are_counted() -> None:
    tensor = torch.ones(2, 3)
    tensor[1, 2] = float("nan")
    with pytest.raises(NonFinite) as caught:
        check_tensor("w", tensor)
    assert caught.value.message == "tensor w holds 1 value that is not finite (nan) at (1, 2)"
    tensor[0, 1] = float("inf")
    with pytest.raises(NonFinite) as caught:
        check_tensor("w", tensor)
    assert caught.value.message == "tensor w holds 2 values that are not finite, the first (inf) at (0, 1)"
