"""A source in few bits gives the checkpoint that the model it decodes to gives, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gptq_cli.config import ModelRef
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.model.weights import load_resident
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement, PlacementEntry
from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, Ran, gptq
from tests.encoders import STYLES, store_in_few_bits
from tests.tiny import randomize, save_tokenizer

_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt_oss": partial(
        transformers.GptOssConfig,
        **_SHAPE | {"intermediate_size": 64},
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "deepseek_v3": partial(
        transformers.DeepseekV3Config,
        **_SHAPE,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
}
CASES = [
    *((name, "llama") for name, style in STYLES.items() if style.experts is None),
    ("fp8-blocks", "qwen3_moe"),
    ("compressed-channel", "qwen3_moe"),
    ("modelopt-nvfp4", "qwen3_moe"),
    ("fp8-blocks", "deepseek_v3"),
    ("compressed-nvfp4", "deepseek_v3"),
    ("mxfp4", "gpt_oss"),
]


@pytest.fixture(scope="module")
def plain(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model in bfloat16, by its name."""
    root = tmp_path_factory.mktemp("plain")

    def make(name: str) -> Path:
        if name not in CONFIGS:
            return tiny(name, dtype=torch.bfloat16)
        folder = root / name
        if not folder.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
            randomize(model, 0)
            model.to(torch.bfloat16).save_pretrained(folder)
            save_tokenizer(folder)
        return folder

    return make


def quantized(source: Path, out: Path, text: Path, *more: str) -> Ran:
    return gptq(
        "quantize", source, "--out", out, "--calibration", text, "--recipe", "fast", *FAST, "--json", *more
    )


@pytest.mark.parametrize(("style", "name"), CASES, ids=[f"{name}-{style}" for style, name in CASES])
def test_the_checkpoint_is_that_of_the_decoded_model(
    style: str, name: str, plain: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    coded, decoded = store_in_few_bits(plain(name), tmp_path, STYLES[style])
    made = {}
    for source in (coded, decoded):
        out = tmp_path / f"{source.name}-q"
        ran = quantized(source, out, text)
        assert ran.code == 0, ran.stderr
        made[source.name] = ran.document
    ours, theirs = (load_file(tmp_path / f"{name}-q" / "model.safetensors") for name in ("coded", "decoded"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key
    config, plain_config = (
        json.loads((tmp_path / f"{name}-q" / "config.json").read_text()) for name in ("coded", "decoded")
    )
    assert config == plain_config
    assert made["coded"]["source_format"].endswith("decoded to bfloat16 while read")
    assert made["decoded"]["source_format"] == "dense"
    assert made["coded"]["size_before_bytes"] < made["decoded"]["size_before_bytes"]
    assert made["coded"]["size_after_bytes"] == made["decoded"]["size_after_bytes"]


ON_CPU = Placement((PlacementEntry("", CPU, 0, True),), CPU, "test")


@pytest.mark.parametrize(("style", "name"), [("fp8-tensor-static", "llama"), ("mxfp4", "gpt_oss")])
def test_resident_weights_are_those_of_the_decoded_model(
    style: str, name: str, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    models = []
    for folder in store_in_few_bits(plain(name), tmp_path, STYLES[style]):
        ref = ModelRef(model=str(folder))
        models.append(load_resident(open_skeleton(find_model(ref), ref), ON_CPU))
    ours, theirs = (dict((*m.named_parameters(), *m.named_buffers())) for m in models)
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert {tensor.device.type for tensor in ours.values()} == {"cpu"}


def test_the_source_is_named_and_compared_with(
    plain: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    coded, decoded = store_in_few_bits(plain("llama"), tmp_path, STYLES["fp8-tensor-static"])
    out = tmp_path / "q"
    words = ("quantize", coded, "--out", out, "--calibration", text, "--recipe", "fast", *FAST[:-1], "plain")
    ran = gptq(*words)
    assert ran.code == 0, ran.stderr
    words_of = "fp8, a scale per tensor, decoded to bfloat16 while read"
    assert f"source       {words_of}" in ran.stdout.replace("\n", " ")
    assert words_of in ran.stderr
    assert "[decoded-source]" in ran.stderr
    assert "lm_head.input_scale" in ran.stderr
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    measure = ("--eval", text, "--seq-len", "48", "--windows", "2", "--progress", "none", "--json")
    against = [gptq("load", out, "--against", source, *measure) for source in (coded, decoded)]
    assert [run.code for run in against] == [0, 0], against[0].stderr
    assert against[0].document["agreement"] == against[1].document["agreement"]
    assert gptq("load", out, "--verify", "--json").document["ok"]


def test_another_dtype_is_cast_from_the_decoded_values(
    plain: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    coded, decoded = store_in_few_bits(plain("llama"), tmp_path, STYLES["modelopt-fp8"])
    for source in (coded, decoded):
        assert quantized(source, tmp_path / f"{source.name}-q", text, "--dtype", "float16").code == 0
    ours, theirs = (load_file(tmp_path / f"{name}-q" / "model.safetensors") for name in ("coded", "decoded"))
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert ours["lm_head.weight"].dtype == torch.float16


def test_layers_that_the_model_does_not_run_are_decoded_too(
    plain: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """As a layer for multi-token prediction, which the files hold after the last block."""
    coded, _ = store_in_few_bits(plain("llama"), tmp_path, STYLES["fp8-blocks"])
    tensors = load_file(coded / "model.safetensors")
    for ending in ("", "_scale_inv"):
        name = f"self_attn.q_proj.weight{ending}"
        tensors[f"model.layers.3.{name}"] = tensors[f"model.layers.0.{name}"].clone()
    save_file(tensors, coded / "model.safetensors", {"format": "pt"})
    assert quantized(coded, tmp_path / "q", text).code == 0
    kept = load_file(tmp_path / "q" / "model.safetensors")
    assert kept["model.layers.3.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert not [name for name in kept if name.endswith("_scale_inv")]


def test_codes_and_scales_may_lie_in_different_files(
    plain: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    coded, _ = store_in_few_bits(plain("llama"), tmp_path, STYLES["compressed-nvfp4"])
    assert quantized(coded, tmp_path / "one", text).code == 0
    tensors = load_file(coded / "model.safetensors")
    (coded / "model.safetensors").unlink()
    shards = {f"model-0000{i}-of-00003.safetensors": dict[str, torch.Tensor]() for i in (1, 2, 3)}
    for number, name in enumerate(sorted(tensors)):
        list(shards.values())[number % 3][name] = tensors[name]
    for file, held in shards.items():
        save_file(held, coded / file, {"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    (coded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert quantized(coded, tmp_path / "three", text).code == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("three", "one"))
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def damaged(coded: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(coded / "model.safetensors")
    change(tensors)
    save_file(tensors, coded / "model.safetensors", {"format": "pt"})


KEY = "model.layers.1.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda tensors: tensors.pop(KEY), 3, "[missing-scale]"),
        (lambda tensors: tensors.update({KEY: torch.ones(9, 9)}), 3, "[scale-mismatch]"),
        (lambda tensors: tensors[KEY].fill_(float("nan")), 5, KEY),
        (lambda tensors: tensors[KEY].zero_(), 2, KEY),
    ],
    ids=["missing", "shape", "nan", "zero"],
)
def test_damage_is_named(
    change: Any, code: int, says: str, plain: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    coded, _ = store_in_few_bits(plain("llama"), tmp_path, STYLES["fp8-blocks"])
    damaged(coded, change)
    ran = quantized(coded, tmp_path / "q", text)
    assert ran.code == code, ran.stderr
    assert says in ran.stderr
    assert not (tmp_path / "q").exists()


def test_few_bits_without_a_config_are_refused(
    plain: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    coded, _ = store_in_few_bits(plain("llama"), tmp_path, STYLES["fp8-blocks"])
    config = json.loads((coded / "config.json").read_text())
    del config["quantization_config"]
    (coded / "config.json").write_text(json.dumps(config))
    ran = quantized(coded, tmp_path / "q", text)
    assert ran.code == 3
    assert "[unsupported-dtype] model.layers.0" in ran.stderr
