"""A checkpoint becomes a model that answers like the dense model of its weights; damage is named."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.errors import CheckpointError
from gptq_cli.gptq.packing import pack_rows, unpack_rows
from gptq_cli.inference.load import (
    compile_forward,
    default_placement,
    kernel_counts,
    load_quantized,
    packed_linears,
    resident_bytes,
)
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import Placement, PlacementEntry
from tests.checkpoint.checkpoints import Recipe, dense_copy, quantize_directory, quantize_slowly, write_config
from tests.conftest import TinyFactory
from tests.tiny import TINY

IDS = torch.randint(2, 500, (2, 12), generator=torch.Generator().manual_seed(3))
EXPERTS = {"mixtral", "qwen3_moe"}


def load(path: Path, dtype: Any = "float32", **options: Any) -> Any:
    checkpoint = open_checkpoint(path, dtype=dtype)
    return load_quantized(checkpoint, default_placement(checkpoint), **options)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def close_logits(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found.float() - expected.float()).norm() / expected.float().norm() < tolerance)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_architecture(name: str, tiny: TinyFactory, tmp_path: Path) -> None:
    source = tiny(name)
    conv1d = name == "gpt2"
    weights = quantize_directory(source, tmp_path / "q", Recipe(group_size=32), transposed=conv1d)
    model = load(tmp_path / "q")
    assert len(packed_linears(model)) == len(weights)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training
    dense = dense_copy(source, weights, torch.float32, transposed=conv1d)
    assert close_logits(logits(model), logits(dense), 1e-5)
    half = load(tmp_path / "q", "bfloat16")
    assert close_logits(logits(half), logits(dense), 0.1)
    assert half.config.use_cache is True


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(bits=2, group_size=32),
        Recipe(bits=3, group_size=32),
        Recipe(bits=8, group_size=-1),
        Recipe(bits=4, group_size=32, sym=False, version="gptq_v2"),
        Recipe(bits=4, group_size=32, sym=False, version="gptq"),
        Recipe(bits=4, group_size=16, desc_act=True),
        Recipe(bits=4, group_size=48),
        Recipe(bits=4, group_size=32, scale_dtype=torch.bfloat16),
        Recipe(bits=4, group_size=32, g_idx=False),
        Recipe(bits=4, group_size=32, skip=()),
    ],
    ids=[
        "2bit",
        "3bit",
        "8bit-row",
        "asym-v2",
        "asym-v1",
        "desc_act",
        "ragged",
        "bf16-scales",
        "no-g_idx",
        "lm_head",
    ],
)
def test_every_kind_of_checkpoint(recipe: Recipe, tiny_llama: Path, tmp_path: Path) -> None:
    weights = quantize_directory(tiny_llama, tmp_path / "q", recipe)
    assert ("lm_head" in weights) is (recipe.skip == ())
    dense = logits(dense_copy(tiny_llama, weights, torch.float32))
    assert close_logits(logits(load(tmp_path / "q")), dense, 1e-5)
    assert close_logits(logits(load(tmp_path / "q", "bfloat16")), dense, 0.1)


def as_gptqmodel_writes_it(path: Path, bits: int, quantizer: str) -> Path:
    """Give a gptq_v2 checkpoint some zeros of 0; return its copy in format gptq, as GPTQModel writes it."""
    generator = torch.Generator().manual_seed(bits)

    def with_zeros(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(".qzeros"):
                columns = tensors[name.replace("qzeros", "scales")].shape[1]
                zeros = unpack_rows(tensors[name].T.contiguous(), bits, columns)
                zeros[torch.rand(zeros.shape, generator=generator) < 0.1] = 0
                tensors[name] = pack_rows(zeros, bits).T.contiguous()

    def subtracted(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(".qzeros"):
                tensors[name] -= sum(1 << place for place in range(0, 32, bits))

    rewrite(path, with_zeros)
    copied = Path(shutil.copytree(path, path.parent / "gptq"))
    rewrite(copied, subtracted)
    write_config(
        copied, Recipe(bits=bits, group_size=32, sym=False, extra={"meta": {"quantizer": quantizer}})
    )
    return copied


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("quantizer", ["gptqmodel:5.7.0", ["optimum:1.24.0", "gptqmodel:7.6.0"]])
def test_zeros_of_0_in_asymmetric_codes_of_gptqmodel(
    bits: int, quantizer: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = Recipe(bits=bits, group_size=32, sym=False, version="gptq_v2")
    quantize_directory(tiny_llama, tmp_path / "q", recipe)
    copied = as_gptqmodel_writes_it(tmp_path / "q", bits, quantizer)
    assert torch.equal(logits(load(copied)), logits(load(tmp_path / "q")))
    write_config(copied, Recipe(bits=bits, group_size=32, sym=False))
    assert not torch.equal(logits(load(copied)), logits(load(tmp_path / "q"))), "field by field"


def test_quantized_head_of_a_model_with_tied_config(tiny: TinyFactory, tmp_path: Path) -> None:
    """Tied embeddings, quantized output head: the embedding stays dense, the head has its own codes."""
    source = tiny("llama_tied")
    weights = quantize_directory(source, tmp_path / "q", Recipe(group_size=32))
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    head = quantize_slowly(tensors["model.embed_tokens.weight"], Recipe(group_size=32))
    save_file(tensors | head.tensors("lm_head"), tmp_path / "q" / "model.safetensors")
    model = load(tmp_path / "q")
    assert "lm_head" in packed_linears(model)
    hidden = torch.randn(3, 64)
    expected = hidden.double() @ head.weight.T
    assert torch.allclose(model.lm_head(hidden).double(), expected, atol=1e-4)
    assert weights


def test_dynamic_overrides(tiny_llama: Path, tmp_path: Path) -> None:
    """One block in 8 bits with other groups, one linear dense."""
    weights = quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    source = load_file(tiny_llama / "model.safetensors")
    wide = Recipe(bits=8, group_size=64)
    for name in [name for name in weights if ".layers.1." in name]:
        packed = quantize_slowly(source[f"{name}.weight"], wide)
        tensors |= packed.tensors(name)
        weights[name] = packed.weight
    dense = "model.layers.2.mlp.down_proj"
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{dense}.{part}"]
    tensors[f"{dense}.weight"] = source[f"{dense}.weight"]
    del weights[dense]
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "q" / "model.safetensors")
    dynamic = {
        r"-:model\.layers\.2\.mlp\.down_proj": {},
        r"+:.*\.layers\.1\..*": {"bits": 8, "group_size": 64},
    }
    write_config(tmp_path / "q", Recipe(group_size=32, extra={"dynamic": dynamic}))
    model = load(tmp_path / "q")
    assert {module.bits for module in packed_linears(model).values()} == {4, 8}
    dense = dense_copy(tiny_llama, weights, torch.float32)
    assert close_logits(logits(model), logits(dense), 1e-5)


def test_shards_and_a_single_config_file(tiny: TinyFactory, tmp_path: Path) -> None:
    source = tiny("llama", shards=3)
    weights = quantize_directory(source, tmp_path / "q", Recipe(group_size=32))
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    (tmp_path / "q" / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    halves = [names[::2], names[1::2]]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, tmp_path / "q" / file)
    table = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (tmp_path / "q" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (tmp_path / "q" / "quantize_config.json").unlink()
    model = load(tmp_path / "q")
    assert close_logits(logits(model), logits(dense_copy(source, weights, torch.float32)), 1e-5)


def test_the_kernel_can_be_requested(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    model = load(tmp_path / "q", "bfloat16", kernel_choice="dequantize")
    (count,) = kernel_counts(model)
    assert (count.kernel, count.linears, count.reason) == ("dequantize", 21, "requested")


def test_progress_and_size(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    seen: list[tuple[int, int]] = []
    model = load(tmp_path / "q", on_linear=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 21) for done in range(1, 22)]
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.numel()]
    assert resident_bytes(model) == sum(t.numel() * t.element_size() for t in tensors)


def test_tensors_do_not_keep_the_file_in_memory(tiny_llama: Path, tmp_path: Path) -> None:
    """Loaded tensors are memory of their own: the file may go away, and nothing of it stays mapped."""
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    model = load(tmp_path / "q")
    before = logits(model)
    file = tmp_path / "q" / "model.safetensors"
    assert str(file) not in Path("/proc/self/maps").read_text()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(logits(model), before)


def test_only_one_dense_linear_at_a_time(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dense copy of a packed weight is made while loading."""
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    monkeypatch.setattr(
        "gptq_cli.inference.kernels.Dequantize.dense", lambda *_: pytest.fail("made a weight dense at load")
    )
    model = load(tmp_path / "q")
    stored = sum(
        t.numel() * t.element_size() for t in load_file(tmp_path / "q" / "model.safetensors").values()
    )
    assert resident_bytes(model) < 1.1 * stored


def test_default_placement_says_why(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    checkpoint = open_checkpoint(tmp_path / "q")
    monkeypatch.setattr("gptq_cli.inference.load.current_accelerator", lambda: CPU)
    placement = default_placement(checkpoint)
    assert placement.devices == (CPU,)
    assert "no accelerator" in placement.reason
    monkeypatch.setattr("gptq_cli.inference.load.current_accelerator", lambda: Device("cuda", 1))
    placement = default_placement(checkpoint)
    assert placement.devices == (Device("cuda", 1),)
    assert "cuda:1 is the current accelerator" in placement.reason


def test_disk_is_not_supported_when_loading(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    checkpoint = open_checkpoint(tmp_path / "q")
    entries = (
        PlacementEntry("model", CPU, 1, True),
        PlacementEntry("lm_head", Device("disk"), 1, True),
    )
    with pytest.raises(CheckpointError, match="modules on disk"):
        load_quantized(checkpoint, Placement(entries, CPU, "asked for"))


def test_experts_quantized_in_part_are_named(tiny: TinyFactory, tmp_path: Path) -> None:
    source = tiny("qwen3_moe")
    quantize_directory(source, tmp_path / "q", Recipe(group_size=32))
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    dense = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.down_proj"
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{part}"]
    tensors[f"{name}.weight"] = dense[f"{name}.weight"]
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2\.down_proj is not quantized, though others"):
        load(tmp_path / "q")


SPREAD = Placement(
    (
        PlacementEntry("model.embed_tokens", Device("cuda", 0), 1, True),
        PlacementEntry("model.layers.0", Device("cuda", 0), 1, True),
        PlacementEntry("model.layers.1", CPU, 1, True),
        PlacementEntry("model.layers.2", CPU, 1, True),
        PlacementEntry("model.norm", Device("cuda", 0), 1, True),
        PlacementEntry("model.rotary_emb", Device("cuda", 0), 1, False),
        PlacementEntry("lm_head", Device("cuda", 0), 1, True),
    ),
    Device("cuda", 0),
    "a test that has no accelerator",
)


def test_cpu_entries_beside_an_accelerator(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offloaded linears are built for the main device, kept on the CPU, and run under accelerate's hooks.

    The accelerator is played by the CPU; what accelerate is asked for is checked, and its hooks are real.
    """
    weights = quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    asked: dict[str, Any] = {}
    built: list[Device] = []

    def play(device: Device) -> torch.device:
        built.append(device)
        return torch.device("cpu")

    def dispatch(model: Any, **options: Any) -> None:
        asked.update(options)
        for name, device in options["device_map"].items():
            if device == "cpu":
                accelerate.cpu_offload(
                    model.get_submodule(name), execution_device=torch.device("cpu"), offload_buffers=True
                )

    monkeypatch.setattr("gptq_cli.inference.load.torch_device", play)
    monkeypatch.setattr(accelerate, "dispatch_model", dispatch)
    checkpoint = open_checkpoint(tmp_path / "q", dtype="bfloat16")
    model = load_quantized(checkpoint, SPREAD)
    assert asked["device_map"] == SPREAD.accelerate_map()
    assert asked["main_device"] == 0
    assert asked["offload_buffers"] is True
    assert built[:7] == [Device("cuda", 0)] * 7  # block 0: built where it stays
    assert built[7:21] == [Device("cuda", 0), CPU] * 7  # block 1: built for the main device, then taken away
    assert model.model.layers[1].mlp.up_proj.packed.is_meta
    dense = dense_copy(tiny_llama, weights, torch.float32)
    assert close_logits(logits(model), logits(dense), 0.1)


@pytest.mark.slow
def test_a_compiled_model_answers_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    model = load(tmp_path / "q")
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it compiles
        compile_forward(model)
        assert close_logits(logits(model), expected, 1e-4)


# -- hostile and damaged checkpoints --------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def set_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON header of the file and leave its data alone."""
    data = (path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + length])
    change(head)
    text = json.dumps(head).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


Q = "model.layers.0.self_attn.q_proj"


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def header_of_a_terabyte(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


class Bomb:
    """Ends the process of whoever unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return __import__("os")._exit, (99,)


def index_to(target: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        shutil.copy(path / "model.safetensors", path.parent / "outside.safetensors")
        names = list(load_file(path / "model.safetensors"))
        (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
        table = dict.fromkeys(names, target.format(parent=path.parent))
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    return damage


def change_tensor(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda tensors: tensors.update({name: make(tensors[name])}))


def drop(name: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda tensors: tensors.__delitem__(name))


def negative_shape(path: Path) -> None:
    set_header(path, lambda head: head[f"{Q}.scales"].update(shape=[-2, -64]))


def out_of_range(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[5] = 99
    return tensor


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (truncated, "truncated"),
    "2^40 header": (header_of_a_terabyte, "claims 1099511627776 bytes"),
    "pickle": (pickled, "pickle"),
    "absolute path": (index_to("{parent}/outside.safetensors"), "outside"),
    "path upwards": (index_to("../outside.safetensors"), "outside"),
    "negative shape": (negative_shape, "shape"),
    "g_idx out of range": (change_tensor(f"{Q}.g_idx", out_of_range), "g_idx holds group 99"),
    "g_idx negative": (change_tensor(f"{Q}.g_idx", lambda t: t - 1), "g_idx holds group -1"),
    "qweight as int64": (change_tensor(f"{Q}.qweight", lambda t: t.long()), r"qweight has dtype int64"),
    "scales as integers": (change_tensor(f"{Q}.scales", lambda t: t.int()), r"scales has dtype int32"),
    "scales with NaN": (change_tensor(f"{Q}.scales", lambda t: t * float("nan")), "not finite"),
    "qzeros cut": (change_tensor(f"{Q}.qzeros", lambda t: t[:, :-1]), r"qzeros has shape"),
    "qweight missing": (drop(f"{Q}.qweight"), r"qweight is missing"),
    "scales missing": (drop(f"{Q}.scales"), r"scales is missing"),
    "norm missing": (drop("model.norm.weight"), "model.norm.weight is missing"),
    "embedding cut": (change_tensor("model.embed_tokens.weight", lambda t: t[:-1]), "embed_tokens.weight"),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_damage_is_named(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    damage, words = DAMAGE[kind]
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    damage(tmp_path / "q")
    with pytest.raises(CheckpointError, match=words) as caught:
        load(tmp_path / "q")
    assert caught.value.exit_code == 2


def test_a_generation_config_that_is_none(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    (tmp_path / "q" / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load(tmp_path / "q")
