"""The reader: what we and others wrote opens; what is missing, wrong or hostile is named; nothing is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli.checkpoint.checkpoint import read_packed, trivial_g_idx
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import CheckpointError, GptqError
from gptq_cli.model.experts import FoundExperts
from gptq_cli.model.fill import fill_dense
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.source import INDEX
from tests.checkpoint.unquantized import edit, opened, random_packed, write_checkpoint
from tests.conftest import TinyFactory
from tests.tiny import TINY

Q = "model.layers.1.mlp.up_proj"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@pytest.fixture(scope="module")
def sound(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file; copied before it is damaged."""
    out = tmp_path_factory.mktemp("reader") / "out"
    write_checkpoint(opened(tiny("qwen2")), out)
    return out


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


def set_config(
    path: Path, where: tuple[str, ...] = ("quantize_config.json", "config.json"), **changes: Any
) -> None:
    for name in where:
        content = json.loads((path / name).read_text())
        target = content["quantization_config"] if name == "config.json" else content
        target.update(changes)
        for key in [key for key, value in target.items() if value is ...]:
            del target[key]
        (path / name).write_text(json.dumps(content))


def without_experts(skeleton: Skeleton) -> Skeleton:
    """The skeleton of a run that leaves experts dense."""
    linears = tuple(linear for linear in skeleton.linears if "experts" not in linear.name)
    return replace(skeleton, linears=linears, experts=FoundExperts(experts=(), dense={}))


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 2
    return caught.value.message


@pytest.mark.parametrize("name", sorted(TINY))
def test_round_trip_of_every_architecture(name: str, tiny: TinyFactory, tmp_path: Path) -> None:
    skeleton = opened(tiny(name))
    packed = write_checkpoint(skeleton, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {
        (i.name, i.source_name, i.in_features, i.out_features, i.bias, i.transposed)
        for i in (*checkpoint.linears, *checkpoint.experts)
    } == {
        (x.name, x.source_name, x.in_features, x.out_features, x.bias, x.transposed) for x in skeleton.linears
    }
    order = [x.name for x in skeleton.linears]
    assert [i.name for i in checkpoint.linears] == [name for name in order if "experts" not in name]
    assert [i.name for i in checkpoint.experts] == [name for name in order if "experts" in name]
    assert checkpoint.blocks == skeleton.blocks
    assert checkpoint.keys.missing == ()
    with checkpoint.reader() as reader:
        for info in (*checkpoint.linears, *checkpoint.experts):
            found, bias = read_packed(reader, info)
            assert all(torch.equal(getattr(found, p), getattr(packed[info.name], p)) for p in PARTS)
            assert (bias is not None) == info.bias
    assert all(p.is_meta for p in checkpoint.model.parameters())
    assert getattr(checkpoint.config, "quantization_config", None) is None
    dense = checkpoint.keys.origins.keys() - {f"{info.name}.weight" for info in checkpoint.linears}
    assert any("embed" in name or "wte" in name for name in dense)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("group_size", "desc_act"), [(-1, False), (32, True), (16, False)])
def test_every_format(
    bits: Any, sym: bool, group_size: int, desc_act: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    quantize = QuantizeConfig(bits=bits, sym=sym, group_size=group_size, desc_act=desc_act)
    packed = write_checkpoint(opened(tiny_llama), tmp_path / "out", quantize)
    found = open_checkpoint(tmp_path / "out")
    assert (found.bits, found.group_size, found.sym, found.desc_act) == (bits, group_size, sym, desc_act)
    assert found.checkpoint_format == ("gptq" if sym else "gptq_v2")
    assert found.quantizer.startswith("gptq-cli:")
    with found.reader() as reader:
        for info in found.linears[:2]:
            assert torch.equal(read_packed(reader, info)[0].g_idx, packed[info.name].g_idx)


def test_shards(tiny_llama: Path, tmp_path: Path) -> None:
    packed = write_checkpoint(opened(tiny_llama), tmp_path / "out", max_shard_bytes=100_000)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len(checkpoint.files.shards) > 2
    with checkpoint.reader() as reader:
        found, _ = read_packed(reader, checkpoint.linears[-1])
    assert torch.equal(found.qweight, packed[checkpoint.linears[-1].name].qweight)


def test_filling_around_the_packed_linears(tiny: TinyFactory, tmp_path: Path) -> None:
    """What `gptq load` does: the linears have their own module, everything else gets its value."""
    write_checkpoint(without_experts(opened(tiny("qwen3_moe"))), tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    for info in checkpoint.linears:
        owner, _, leaf = info.name.rpartition(".")
        setattr(checkpoint.model.get_submodule(owner), leaf, torch.nn.Identity())
    with checkpoint.reader() as reader:
        fill_dense(
            checkpoint.model,
            checkpoint.conversion,
            checkpoint.keys,
            reader.get,
            lambda _: torch.device("cpu"),
            checkpoint.dtype,
        )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    experts = checkpoint.model.model.layers[1].mlp.experts
    assert torch.equal(experts.down_proj[2], stored["model.layers.1.mlp.experts.2.down_proj.weight"])


def test_dtype(tiny: TinyFactory, tmp_path: Path) -> None:
    write_checkpoint(opened(tiny("llama", dtype=torch.bfloat16)), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").dtype == torch.bfloat16
    assert open_checkpoint(tmp_path / "out", dtype="float32").dtype == torch.float32


# what other tools write


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"checkpoint_format": ...}, ""),
        ({"format": ...}, ""),
        ({"checkpoint_format": ..., "format": ...}, "has no checkpoint_format"),
        ({"sym": ...}, "symmetric"),
        (
            {
                "desc_act": ...,
                "lm_head": ...,
                "dynamic": ...,
                "meta": ...,
                "pack_dtype": ...,
                "quant_method": ...,
            },
            "",
        ),
        (
            {"dynamic": None, "meta": {"quantizer": "x"}, "damp_percent": None, "model_file_base_name": None},
            "",
        ),
        ({"is_marlin_format": False}, ""),
        ({"meta": {"quantizer": ["gptqmodel:7.3.4"]}}, ""),
    ],
)
def test_configs_of_others(changes: dict[str, Any], note: str, damaged: Path) -> None:
    set_config(damaged, **changes)
    checkpoint = open_checkpoint(damaged)
    assert (checkpoint.bits, checkpoint.sym, checkpoint.checkpoint_format) == (4, True, "gptq")
    assert note in " ".join(checkpoint.notes)


@pytest.mark.parametrize("gone", ["quantize_config.json", "config.json"])
def test_one_config_is_enough(gone: str, damaged: Path) -> None:
    if gone == "config.json":
        content = json.loads((damaged / "config.json").read_text())
        del content["quantization_config"]
        (damaged / "config.json").write_text(json.dumps(content))
        (damaged / "quantize_config.json").rename(damaged / "quant_config.json")
    else:
        (damaged / gone).unlink()
    assert len(open_checkpoint(damaged).linears) == 14


def test_missing_g_idx(damaged: Path) -> None:
    edit(damaged, lambda t: [t.pop(name) for name in list(t) if name.endswith("g_idx")] and None)
    checkpoint = open_checkpoint(damaged)
    info = checkpoint.linears[0]
    assert not info.has_g_idx
    assert "no g_idx" in " ".join(checkpoint.notes)
    with checkpoint.reader() as reader:
        assert read_packed(reader, info)[0].g_idx.tolist() == [k // 32 for k in range(64)]


def test_a_g_idx_of_zeros_means_none(damaged: Path) -> None:
    edit(damaged, lambda t: t.update({f"{Q}.g_idx": torch.zeros(64, dtype=torch.int32)}))
    checkpoint = open_checkpoint(damaged)
    (info,) = [i for i in checkpoint.linears if i.name == Q]
    with checkpoint.reader() as reader:
        assert torch.equal(read_packed(reader, info)[0].g_idx, trivial_g_idx(info))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_in_other_dtypes(dtype: torch.dtype, damaged: Path) -> None:
    edit(damaged, lambda t: t.update({n: x.to(dtype) for n, x in t.items() if n.endswith("scales")}))
    checkpoint = open_checkpoint(damaged)
    with checkpoint.reader() as reader:
        assert read_packed(reader, checkpoint.linears[0])[0].scales.dtype == dtype


def test_a_bias_that_the_architecture_does_not_have(damaged: Path) -> None:
    edit(damaged, lambda t: t.update({f"{Q}.bias": torch.zeros(128)}))
    (info,) = [i for i in open_checkpoint(damaged).linears if i.name == Q]
    assert info.bias


def test_autogptq_file_name(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "gptq_model-4bit-32g.safetensors")
    assert len(open_checkpoint(damaged).linears) == 14


def repack(out: Path, linear_name: str, skeleton: Any, quantize: QuantizeConfig) -> None:
    (linear,) = [x for x in skeleton.linears if x.name == linear_name]
    packed = random_packed(linear, quantize)
    edit(out, lambda t: t.update({f"{linear_name}.{p}": getattr(packed, p) for p in PARTS}))


def test_dynamic_overrides(damaged: Path, tiny: TinyFactory) -> None:
    repack(damaged, Q, opened(tiny("qwen2")), QuantizeConfig(bits=8, group_size=64))
    assert f"tensor {Q}.qweight has shape" in refused(damaged)
    set_config(
        damaged, dynamic={r"-:.*lm_head": {}, r"+:.*\.1\.mlp\.up": {"bits": 8, "group_size": 64, "mse": 2.4}}
    )
    by_name = {info.name: info.format for info in open_checkpoint(damaged).linears}
    assert (by_name[Q].bits, by_name[Q].group_size) == (8, 64)
    assert by_name[Q.replace("up", "down")].bits == 4


@pytest.mark.parametrize(
    ("changes", "taken_out", "word"),
    [
        ({"group_size": 64}, None, "group_size"),
        ({"bits": 8}, None, "bits"),
        ({"dynamic": {r"-:.*": {}}}, None, "dynamic"),
        ({}, f"{Q}.scales", "incomplete or damaged"),
        ({"group_size": 64}, "model.norm.weight", "incomplete or damaged"),
    ],
)
def test_settings_that_fit_no_tensor_are_not_a_damaged_file(
    changes: dict[str, Any], taken_out: str | None, word: str, damaged: Path
) -> None:
    set_config(damaged, **changes)
    if taken_out is not None:
        edit(damaged, drop(taken_out))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(damaged)
    assert word in caught.value.hint


def test_dynamic_says_dense_but_it_is_packed(damaged: Path) -> None:
    set_config(damaged, dynamic={r"-:.*up_proj": {}})
    assert "is dense (quantize_config.json: dynamic['-:.*up_proj'])" in refused(damaged)


def test_a_quantized_lm_head(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama)
    write_checkpoint(skeleton, tmp_path / "out")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["lm_head.qweight"] = torch.zeros(8, 512, dtype=torch.int32)
        tensors["lm_head.qzeros"] = torch.zeros(2, 64, dtype=torch.int32)
        tensors["lm_head.scales"] = torch.ones(2, 512, dtype=torch.float16)

    edit(tmp_path / "out", change)
    assert open_checkpoint(tmp_path / "out").linears[-1].name == "lm_head"


def test_experts_by_their_own_names(tiny_moe: Path, tmp_path: Path) -> None:
    write_checkpoint(without_experts(opened(tiny_moe)), tmp_path / "out")
    expert = "model.layers.1.mlp.experts.3.gate_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        rows, columns = tensors.pop(f"{expert}.weight").shape
        tensors[f"{expert}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors[f"{expert}.qzeros"] = torch.zeros(columns // 32, rows // 8, dtype=torch.int32)
        tensors[f"{expert}.scales"] = torch.ones(columns // 32, rows, dtype=torch.float16)

    edit(tmp_path / "out", change)
    assert "`dynamic` says" in refused(tmp_path / "out")
    set_config(tmp_path / "out", dynamic={})
    checkpoint = open_checkpoint(tmp_path / "out")
    (info,) = checkpoint.experts
    assert (info.name, info.in_features, info.out_features) == (expert, 64, 32)
    assert info.fused_into == "model.layers.1.mlp.experts.gate_up_proj"
    assert info.fused_into in checkpoint.keys.origins


# what is refused: the configuration


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"bits": True}, "bits is true"),
        ({"bits": None}, "bits is null"),
        ({"bits": 4.0}, "bits is 4.0; allowed: 2, 3, 4, 8"),
        ({"bits": [4]}, "bits is [4]"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": ...}, "has no bits"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": None}, "group_size is null"),
        ({"group_size": 32.0}, "group_size is 32.0"),
        ({"group_size": -2}, "group_size is -2"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"desc_act": 0.0}, "desc_act is 0.0; allowed: true, false"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"is_marlin_format": True}, "Marlin"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({"checkpoint_format": "marlin", "format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"checkpoint_format": "gptq_v2"}, "but format is"),
        ({"dynamic": {"(": {}}}, "pattern"),
        ({"dynamic": {"a" * 2000: {}}}, "too long"),
        ({"dynamic": {r"-:(\w+)+$": {}}}, "repeats a group that repeats"),
        ({"dynamic": []}, "dynamic is not a JSON object"),
        ({"dynamic": {"a": 3}}, "not a JSON object"),
        ({"dynamic": {".*": {"bits": 7}}}, "bits is 7"),
        ({"dynamic": {".*": {"bits": 4.0}}}, "bits is 4.0; allowed: 2, 3, 4, 8"),
        ({"dynamic": {".*": {"bits": True}}}, "bits is true"),
        ({"dynamic": {".*": {"group_size": 32.0}}}, "group_size is 32.0"),
        ({"dynamic": {".*": {"sym": 1}}}, "sym is 1; allowed: true, false"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], says: str, damaged: Path) -> None:
    set_config(damaged, **changes)
    assert says in refused(damaged)


@pytest.mark.parametrize("file", ["quantize_config.json", "config.json"])
@pytest.mark.parametrize(
    "before", [{}, {"+:nothing": {"bits": 99}}], ids=["alone", "beside one that is unused"]
)
@pytest.mark.parametrize("key", [r"+:.*\.1\.mlp\.up_proj$", r"model\.layers\.1\.mlp\.up_proj$"])
def test_a_bad_value_for_a_linear_is_named_with_its_file_and_key(
    file: str, key: str, before: dict[str, Any], damaged: Path
) -> None:
    set_config(damaged, dynamic=...)
    set_config(damaged, (file,), dynamic={**before, key: {"bits": 5}, ".*": {}})
    assert refused(damaged) == f"{file}: dynamic[{key!r}] for {Q}: bits is 5; allowed: 2, 3, 4, 8"


@pytest.mark.parametrize("changes", [{"bits": 8}, {"group_size": 64}, {"sym": False}, {"desc_act": True}])
def test_two_configurations_that_disagree(changes: dict[str, Any], damaged: Path) -> None:
    set_config(damaged, ("quantize_config.json",), **changes)
    (name,) = changes
    assert refused(damaged).startswith(f"{name} is ")


@pytest.mark.parametrize("file", ["quantize_config.json", "config.json"])
@pytest.mark.parametrize(
    ("quantize", "absent"),
    [
        (QuantizeConfig(group_size=32, sym=False), ("sym",)),
        (QuantizeConfig(group_size=32, sym=False), ("checkpoint_format", "format")),
        (QuantizeConfig(group_size=32, desc_act=True), ("desc_act",)),
        (QuantizeConfig(group_size=32, bits=8), ("bits",)),
        (QuantizeConfig(group_size=-1), ("group_size",)),
        (QuantizeConfig(group_size=32), ("quant_method", "pack_dtype", "lm_head", "dynamic", "meta")),
    ],
)
@pytest.mark.parametrize("left", [..., None], ids=["absent", "null"])
def test_what_one_file_leaves_out_the_other_says(
    file: str, quantize: QuantizeConfig, absent: tuple[str, ...], left: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    write_checkpoint(opened(tiny_llama), tmp_path / "out", quantize)
    whole = open_checkpoint(tmp_path / "out")
    set_config(tmp_path / "out", (file,), **dict.fromkeys(absent, left))
    found = open_checkpoint(tmp_path / "out")
    assert found.format == whole.format
    assert {key: found.config_dict[key] for key in absent} == {key: whole.config_dict[key] for key in absent}


def test_dynamic_may_stand_in_one_file_alone(tiny_moe: Path, tmp_path: Path) -> None:
    write_checkpoint(opened(tiny_moe), tmp_path / "out")
    dense = open_checkpoint(tmp_path / "out").format.dynamic
    assert dense.patterns
    set_config(tmp_path / "out", ("quantize_config.json",), dynamic={})
    assert open_checkpoint(tmp_path / "out").format.dynamic == dense
    set_config(tmp_path / "out", ("quantize_config.json",), dynamic={r"+:.*": {"bits": 8}})
    assert refused(tmp_path / "out").startswith("dynamic is ")


def test_null_is_what_an_absent_key_is(damaged: Path) -> None:
    set_config(damaged, desc_act=None, dynamic=None, pack_dtype=None, quant_method=None, lm_head=None)
    assert not open_checkpoint(damaged).desc_act


def test_a_file_that_says_nothing_of_the_tensors_is_named(damaged: Path) -> None:
    (damaged / "quantize_config.json").write_text('{"quantization_config": {"bits": 4}}')
    assert "quantize_config.json has none of bits, group_size" in refused(damaged)


# what is read: other people's names and places


def rename_weights(path: Path, base: str, parts: int = 1) -> None:
    """The weights under another base name, in `parts` shards with an index where there are several."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if parts == 1:
        save_file(tensors, path / f"{base}.safetensors")
        return
    places = {}
    for part in range(parts):
        file = f"{base}-{part + 1:05d}-of-{parts:05d}.safetensors"
        half = {name: tensors[name] for name in sorted(tensors)[part::parts]}
        save_file(half, path / file)
        places |= dict.fromkeys(half, file)
    (path / f"{base}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("beside", [None, "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("gptq_model-4bit-32g", None),
        ("my-weights", "my-weights"),
        ("my-weights", "my-weights.safetensors"),
        ("anything", None),
    ],
)
def test_names_of_weights(base: str, said: str | None, beside: str | None, parts: int, damaged: Path) -> None:
    rename_weights(damaged, base, parts)
    set_config(damaged, ("quantize_config.json",), model_file_base_name=said)
    if beside is not None:
        save_file({"x": torch.zeros(1)}, damaged / beside)
    found = open_checkpoint(damaged)
    assert len(found.files.shards) == parts
    assert all(shard.name.startswith(base) for shard in found.files.shards)


def test_the_name_that_the_config_says_wins(damaged: Path) -> None:
    """Also over a dense model.safetensors, which AutoGPTQ's users kept beside."""
    rename_weights(damaged, "gptq_model-4bit-32g")
    save_file({"model.norm.weight": torch.zeros(64)}, damaged / "model.safetensors")
    assert open_checkpoint(damaged).files.shards[0].name == "gptq_model-4bit-32g.safetensors"
    set_config(damaged, model_file_base_name="other")
    rename = damaged / "gptq_model-4bit-32g.safetensors"
    rename.rename(damaged / "other.safetensors")
    assert open_checkpoint(damaged).files.shards[0].name == "other.safetensors"


def test_a_base_name_leads_nowhere_else(damaged: Path) -> None:
    rename_weights(damaged, "lone")
    shutil.copy(damaged / "lone.safetensors", damaged.parent / "outside.safetensors")
    set_config(damaged, model_file_base_name="../outside")
    assert [shard.name for shard in open_checkpoint(damaged).files.shards] == ["lone.safetensors"]


def test_several_files_and_no_index(damaged: Path) -> None:
    rename_weights(damaged, "gptq_model-4bit-32g", 2)
    (damaged / "gptq_model-4bit-32g.safetensors.index.json").unlink()
    message = refused(damaged)
    assert "gptq_model-4bit-32g-00001-of-00002.safetensors" in message
    assert "which of" in message


def test_a_broken_index_of_another_name_is_named(damaged: Path) -> None:
    rename_weights(damaged, "gptq_model-4bit-32g", 2)
    (damaged / "gptq_model-4bit-32g.safetensors.index.json").write_text("{}")
    assert "gptq_model-4bit-32g.safetensors.index.json has no weight_map" in refused(damaged)


def test_a_bias_that_the_class_has_not_is_no_leftover(tiny_llama: Path, tmp_path: Path) -> None:
    """AutoGPTQ writes one for every linear."""
    write_checkpoint(opened(tiny_llama), tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    edit(tmp_path / "out", swap(f"{name}.bias", torch.ones(64).half()))
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.keys.unexpected == ()
    assert not [note for note in checkpoint.notes if "unread" in note]
    assert [info.name for info in checkpoint.linears if info.bias] == [name]


@pytest.mark.parametrize("inner", [("text_config",), ("thinker_config", "text_config")])
@pytest.mark.parametrize("both", [True, False])
def test_a_quantization_config_inside_another_config(
    inner: tuple[str, ...], both: bool, damaged: Path
) -> None:
    config = json.loads((damaged / "config.json").read_text())
    held = config.pop("quantization_config")
    nested: dict[str, Any] = {"quantization_config": held}
    for key in reversed(inner):
        nested = {key: nested}
    (damaged / "config.json").write_text(json.dumps(config | nested))
    if not both:
        (damaged / "quantize_config.json").unlink()
    found = open_checkpoint(damaged)
    assert found.group_size == 32
    assert not hasattr(found.config, "quantization_config")
    if both:
        set_config(damaged, ("quantize_config.json",), sym=False)
        assert (
            refused(damaged)
            == f"sym is false in quantize_config.json but true in config.json: {': '.join(inner)}"
        )


def test_another_method_inside_another_config_is_named(damaged: Path) -> None:
    (damaged / "quantize_config.json").unlink()
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization_config"]
    config["text_config"] = {"quantization_config": {"quant_method": "compressed-tensors", "bits": 4}}
    (damaged / "config.json").write_text(json.dumps(config))
    assert "quant_method is 'compressed-tensors'" in refused(damaged)


def test_not_quantized_at_all(tiny_llama: Path, tmp_path: Path) -> None:
    assert "is not a GPTQ checkpoint" in refused(tiny_llama)
    assert "no such directory" in refused(tmp_path / "nothing")


def test_packed_tensors_without_a_config(damaged: Path) -> None:
    (damaged / "quantize_config.json").unlink()
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization_config"]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has packed tensors, but neither") as caught:
        open_checkpoint(damaged)
    assert "fetch the quantize_config.json" in str(caught.value.hint)


def test_a_dense_model_that_calls_itself_quantized(tiny_llama: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_llama, tmp_path / "out"))
    (path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    assert "no quantized linears" in refused(path)


@pytest.mark.parametrize("file", ["quantize_config.json", "config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", '{"quantization_config": 3}', "3"])
def test_broken_json(file: str, text: str, damaged: Path) -> None:
    (damaged / file).write_text(text)
    with pytest.raises(GptqError) as caught:
        open_checkpoint(damaged)
    assert file in caught.value.message or "quantization" in caught.value.message


# what is refused: tensors


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda t: t.pop(name) is None or None


def swap(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda t: t.update({name: value})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(f"{Q}.qweight"), f"tensor {Q}.qweight is missing"),
        (drop(f"{Q}.qzeros"), f"tensor {Q}.qzeros is missing"),
        (drop(f"{Q}.scales"), f"tensor {Q}.scales is missing"),
        (drop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (
            drop("model.layers.0.self_attn.q_proj.bias"),
            "tensor model.layers.0.self_attn.q_proj.bias is missing",
        ),
        (swap(f"{Q}.qweight", torch.zeros(8, 128)), f"tensor {Q}.qweight has dtype float32; allowed: int32"),
        (swap(f"{Q}.scales", torch.zeros(2, 128, dtype=torch.int32)), f"tensor {Q}.scales has dtype int32"),
        (
            swap(f"{Q}.qweight", torch.zeros(9, 128, dtype=torch.int32)),
            f"tensor {Q}.qweight has shape [9, 128]",
        ),
        (swap(f"{Q}.qzeros", torch.zeros(2, 17, dtype=torch.int32)), f"tensor {Q}.qzeros has shape [2, 17]"),
        (swap(f"{Q}.scales", torch.zeros(1, 128).half()), f"tensor {Q}.scales has shape [1, 128]"),
        (swap(f"{Q}.g_idx", torch.zeros(63, dtype=torch.int32)), f"tensor {Q}.g_idx has shape [63]"),
        (swap(f"{Q}.bias", torch.zeros(5)), f"tensor {Q}.bias does not have 128 values"),
        (swap(f"{Q}.weight", torch.zeros(128, 64)), f"there are both {Q}.weight and {Q}.qweight"),
        (swap("model.norm.weight", torch.zeros(3)), "tensor model.norm.weight has shape [3]"),
        (lambda t: t.update({"model.norm.qweight": t.pop("model.norm.weight")}), "which is not a linear"),
        (
            swap("ghost.qweight", torch.zeros(8, 64, dtype=torch.int32)),
            "tensor ghost.qweight belongs to no module",
        ),
        (
            swap("ghost.scales", torch.zeros(8, 64)),
            "tensor ghost.qweight is missing, but ghost.scales is there",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], None], says: str, damaged: Path
) -> None:
    edit(damaged, change)
    assert says in refused(damaged)


def test_g_idx_is_needed_with_desc_act(damaged: Path) -> None:
    set_config(damaged, desc_act=True)
    edit(damaged, drop(f"{Q}.g_idx"))
    assert f"tensor {Q}.g_idx is missing, and desc_act needs it" in refused(damaged)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("g_idx", -1, "g_idx holds group -1; allowed: 0 to 1"),
        ("g_idx", 2, "g_idx holds group 2; allowed: 0 to 1"),
        ("g_idx", 2**31 - 1, "g_idx holds group 2147483647"),
        ("scales", float("nan"), "scales holds values that are not finite"),
        ("scales", float("inf"), "scales holds values that are not finite"),
    ],
)
def test_values_out_of_range(name: str, value: float, says: str, damaged: Path) -> None:
    edit(damaged, lambda t: t[f"{Q}.{name}"].view(-1).__setitem__(3, value))
    checkpoint = open_checkpoint(damaged)
    (info,) = [i for i in checkpoint.linears if i.name == Q]
    with checkpoint.reader() as reader, pytest.raises(CheckpointError, match=says):
        read_packed(reader, info)


def test_more_problems_are_counted(damaged: Path) -> None:
    edit(damaged, lambda t: [t.pop(n) for n in list(t) if n.endswith("scales")] and None)
    assert "(and 13 more problems)" in refused(damaged)


def test_an_unknown_dense_tensor_is_left_unread(damaged: Path) -> None:
    edit(damaged, swap("model.layers.7.mtp.weight", torch.zeros(3)))
    checkpoint = open_checkpoint(damaged)
    assert checkpoint.keys.unexpected == ("model.layers.7.mtp.weight",)
    assert checkpoint.notes == ("1 tensor that does not belong to the model is not read",)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_a_config_that_was_not_fetched_is_named(name: str, damaged: Path) -> None:
    (damaged / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n")
    with pytest.raises(CheckpointError, match=f"{name} in .* is a pointer of Git LFS") as caught:
        open_checkpoint(damaged)
    assert "lfs pull" in str(caught.value.hint)


# hostile files


def test_a_truncated_shard(damaged: Path) -> None:
    shard = damaged / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "truncated" in refused(damaged)


def test_a_gigantic_header(damaged: Path) -> None:
    (damaged / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "1099511627776" in refused(damaged)


def test_a_negative_shape(damaged: Path) -> None:
    head = json.dumps(
        {f"{Q}.qweight": {"dtype": "I32", "shape": [-8, -128], "data_offsets": [0, 4096]}}
    ).encode()
    (damaged / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(4096))
    assert f"tensor {Q}.qweight has shape [-8, -128]" in refused(damaged)


@pytest.mark.parametrize("path", ["/etc/hostname.safetensors", "../secret.safetensors"])
def test_a_shard_outside(path: str, damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    save_file(tensors, damaged.parent / "secret.safetensors")
    (damaged / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, path)}))
    assert "leave the model's directory" in refused(damaged)


def test_a_pickle_is_not_opened(damaged: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    (damaged / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "gptq_model-4bit-128g.bin", "model.pt"):
        (damaged / name).write_bytes(f"cos\nsystem\n(S'touch {witness}'\ntR.".encode())
    assert "pickled" in refused(damaged)
    assert not witness.exists()


def test_code_is_not_run(damaged: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    (damaged / "evil.py").write_text(f"open({str(witness)!r}, 'w').close()")
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(GptqError, match="Python code"):
        open_checkpoint(damaged)
    assert not witness.exists()
