"""Every tiny architecture: blocks, linears, their tensors in the files, what stays dense, what is refused."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from gptq_cli.config import ModelRef
from gptq_cli.errors import ModelError
from gptq_cli.model.find import find_model
from gptq_cli.model.meta import build_meta
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.model.source import ModelFiles
from gptq_cli.placement.names import fold
from tests.checkpoint.unquantized import opened
from tests.conftest import TinyFactory
from tests.tiny import TINY

# architecture -> (prefix of the blocks, blocks, linears of the first block, linears in all)
EXPECTED = {
    "llama": ("model.layers", 3, 7, 21),
    "llama_tied": ("model.layers", 2, 7, 14),
    "qwen2": ("model.layers", 2, 7, 14),
    "qwen3": ("model.layers", 2, 7, 14),
    "mistral": ("model.layers", 2, 7, 14),
    "gemma2": ("model.layers", 2, 7, 14),
    "gemma3_text": ("model.layers", 2, 7, 14),
    "phi3": ("model.layers", 2, 4, 8),
    "gpt2": ("transformer.h", 2, 4, 8),
    "opt": ("model.decoder.layers", 2, 6, 12),
    "gpt_neox": ("gpt_neox.layers", 2, 4, 8),
    "falcon": ("transformer.h", 2, 4, 8),
    "bloom": ("transformer.h", 2, 4, 8),
    "olmo2": ("model.layers", 2, 7, 14),
    "starcoder2": ("model.layers", 2, 6, 12),
    "stablelm": ("model.layers", 2, 7, 14),
    "qwen3_moe": ("model.layers", 2, 7, 23),
    "mixtral": ("model.layers", 2, 16, 32),
}
TIED = {"llama_tied", "qwen3", "gemma2", "gemma3_text", "gpt2", "opt", "falcon", "bloom", "starcoder2"}
BIASED = {"qwen2", "gpt2", "opt", "gpt_neox", "bloom", "starcoder2", "stablelm"}


def config_of(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_the_table_is_complete() -> None:
    assert set(EXPECTED) == set(TINY)


@pytest.mark.parametrize("name", sorted(TINY))
def test_blocks_linears_and_source_keys(name: str, tiny: TinyFactory) -> None:
    path = tiny(name)
    skeleton = opened(path)
    prefix, blocks, first, linears = EXPECTED[name]
    assert skeleton.blocks_prefix == prefix
    assert skeleton.blocks == tuple(f"{prefix}.{i}" for i in range(blocks))
    assert len(skeleton.linears_of(skeleton.blocks[0])) == first
    assert len(skeleton.linears) == linears
    assert skeleton.problems == ()
    assert skeleton.keys.missing == skeleton.keys.unexpected == ()
    assert any(linear.bias for linear in skeleton.linears) == (name in BIASED)
    assert any(linear.transposed for linear in skeleton.linears) == (name == "gpt2")
    assert bool(skeleton.tied) == (name in TIED)
    stored = load_file(path / "model.safetensors")
    for linear in skeleton.linears:
        weight = stored[linear.source_key]
        shape = (linear.in_features, linear.out_features)
        assert tuple(weight.shape) == (shape if linear.transposed else shape[::-1])
        assert linear.source_name + ".weight" == linear.source_key
        assert (linear.source_name + ".bias" in stored) == linear.bias
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert skeleton.parameters == sum(p.numel() for p in stored.values())
    share = skeleton.quantized_share + sum(item.share for item in skeleton.dense)
    biases = sum(linear.out_features for linear in skeleton.linears if linear.bias) / skeleton.parameters
    assert share + biases == pytest.approx(1)


def test_source_names_are_the_files_own(tiny: TinyFactory) -> None:
    mixtral = opened(tiny("mixtral"))
    experts = mixtral.keys.origins["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.converted
    assert experts.sources[0] == "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert opened(tiny("gpt_neox")).keys.source_of("lm_head.weight") == "embed_out.weight"


def test_files_of_the_bare_base_model(tiny: TinyFactory, tmp_path: Path) -> None:
    """GPT-2's files on the Hub have neither the prefix `transformer.` nor an lm_head, but do hold masks."""
    path = Path(shutil.copytree(tiny("gpt2"), tmp_path / "model"))
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    skeleton = opened(path)
    assert skeleton.problems == ()
    assert skeleton.linears[0].name == "transformer.h.0.attn.c_attn"
    assert skeleton.linears[0].source_key == "h.0.attn.c_attn.weight"
    assert skeleton.keys.unexpected == ("h.0.attn.bias",)


def test_fused_experts_are_linears(tiny_moe: Path) -> None:
    skeleton = opened(tiny_moe)
    assert "model.layers.*.mlp.experts" not in {item.name for item in skeleton.dense}
    assert skeleton.experts.dense == {}
    (gate,) = [x for x in skeleton.linears if x.name == "model.layers.1.mlp.experts.3.gate_proj"]
    assert (gate.in_features, gate.out_features) == (64, 32)
    assert skeleton.trace.complete
    assert gate.name in skeleton.trace.idle


def test_experts_that_cannot_be_taken_apart_are_named(
    tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return hidden_states * self.gate_up_proj.norm()

    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    skeleton = opened(tiny_moe)
    (experts,) = [item for item in skeleton.dense if item.reason == "not computed matrix by matrix"]
    assert (experts.name, experts.modules) == ("model.layers.*.mlp.experts", 1)
    assert experts.share == pytest.approx(4 * 3 * 64 * 32 / skeleton.parameters)
    assert set(skeleton.experts.dense) == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    assert all("norm" in reason for reason in skeleton.experts.dense.values())


def test_other_dense_modules_are_named(tiny_moe: Path) -> None:
    skeleton = opened(tiny_moe)
    reasons = {item.name: item.reason for item in skeleton.dense}
    assert reasons["model.layers.*.mlp.gate"] == "router"
    assert reasons["lm_head"] == "head"
    assert reasons["model.embed_tokens"] == "embedding"
    assert reasons["model.layers.*.input_layernorm"] == "vector"


@pytest.mark.parametrize(
    ("asked", "declared", "stored", "runs"),
    [
        ("auto", "bfloat16", torch.bfloat16, torch.bfloat16),
        ("auto", ..., torch.float16, torch.float16),
        ("auto", "float16", torch.float32, torch.float16),
        ("float32", "bfloat16", torch.bfloat16, torch.float32),
        ("auto", "no_grad", torch.float32, torch.float32),
    ],
)
def test_dtype(
    asked: Any, declared: Any, stored: torch.dtype, runs: torch.dtype, tiny: TinyFactory, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny("llama", dtype=stored), tmp_path / "model"))
    config_of(path, dtype=declared)
    skeleton = opened(path, dtype=asked)
    assert skeleton.dtype == runs
    assert next(skeleton.model.parameters()).dtype == runs


def test_a_70b_shape_costs_no_memory() -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_meta(config, ModelRef(model="x"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) > 70e9
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 300_000  # kilobytes


def test_building_leaves_no_traces(tiny_llama: Path) -> None:
    torch.manual_seed(5)
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    opened(tiny_llama, dtype="bfloat16")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.empty(1).device.type == "cpu"


def test_already_quantized(model: Path) -> None:
    assert opened(model).already_quantized is None
    config_of(model, quantization_config={"quant_method": "bitnet", "quantization_mode": "online"})
    assert opened(model).already_quantized == "quant_method 'bitnet'"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "encoder-decoder",
        ),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is an encoder"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "is an encoder"),
        (
            {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
            "not a causal language model",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"model_type": ..., "architectures": ...}, "has no model_type"),
        ({"model_type": "never_heard_of"}, "cannot be used"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}},
            "Python code",
        ),
        ({"num_hidden_layers": "many"}, "cannot be used"),
        ({"dtype": "float99"}, "says dtype = 'float99'; allowed: float16, bfloat16, float32"),
        ({"torch_dtype": "float99", "dtype": ...}, "says torch_dtype = 'float99'; allowed"),
        ({"dtype": True}, "says dtype = true; allowed"),
        ({"hidden_act": "nope"}, "cannot be built"),
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 layers"),
        ({"model_type": "qwen2", "num_hidden_layers": 10**9}, "asks for 1000000000 layers"),
        ({"transformers_weights": "/etc/passwd"}, "transformers_weights"),
    ],
)
def test_what_is_no_causal_language_model(changes: dict[str, Any], says: str, model: Path) -> None:
    config_of(model, **changes)
    with pytest.raises(ModelError, match=says):
        opened(model)


def test_remote_code_is_not_run(model: Path) -> None:
    (model / "c.py").write_text("raise SystemExit('remote code ran')")
    config_of(model, model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"})
    with pytest.raises(ModelError, match="Python code") as caught:
        opened(model)
    assert "--trust-remote-code" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_broken_config(text: str, model: Path) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        opened(model)


def test_a_missing_weight_and_a_wrong_shape_are_problems(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, model / "model.safetensors")
    found = {(p.kind, p.subject) for p in opened(model).problems}
    assert found == {("missing-weight", "model.norm.weight"), ("shape-mismatch", "lm_head.weight")}


def test_without_tensors_the_plan_still_stands(tiny_llama: Path) -> None:
    """`inspect-map` of a model whose weights cannot be listed: linears go by their names in the model."""
    ref = ModelRef(model=str(tiny_llama))
    files = find_model(ref)
    bare = ModelFiles(directory=files.directory, source=files.source)
    skeleton = open_skeleton(bare, ref)
    assert len(skeleton.linears) == 21
    assert skeleton.problems == ()


def test_fold() -> None:
    assert fold("model.layers.12.mlp.experts.3") == "model.layers.*.mlp.experts.*"
    assert fold("transformer.ln_1") == "transformer.ln_1"
