"""Models with fused experts: quantized expert by expert, under the names that readers know, and read back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.checkpoint.target_facts import target_facts
from gptq_cli.inference.load import default_placement, load_quantized
from gptq_cli.placement.names import leaf
from tests.checkpoint.unquantized import opened, write_checkpoint
from tests.e2e.commands import FAST, gptq
from tests.tiny import randomize, save_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
SMALL = SHAPE | {"moe_intermediate_size": 96, "head_dim": 16}
LATENT = SHAPE | {
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}

Slot = Callable[[Tensor, int], Tensor]
"""(merged tensor, expert) -> the expert's (N, K) view in it."""


def halves(role: int) -> Slot:
    return lambda merged, expert: merged[expert].chunk(2)[role]


def whole(merged: Tensor, expert: int) -> Tensor:
    return merged[expert]


@dataclass(frozen=True)
class Family:
    """A family of models and how its files hold experts, written down from the models' own code."""

    config: str
    fields: dict[str, Any]
    merged: dict[str, tuple[str, Slot]] = field(default_factory=dict)
    """End of a packed linear's name -> (the merged tensor it is a part of, where); {}: files hold experts
    one by one."""


def transposed(slot: Slot) -> Slot:
    return lambda merged, expert: slot(merged.transpose(1, 2), expert)


def every_second(role: int) -> Slot:
    return lambda merged, expert: merged[expert][role::2]


FAMILIES = {
    "qwen3_moe": Family("Qwen3MoeConfig", SMALL | {"num_experts": 16, "mlp_only_layers": []}),
    "mixtral": Family("MixtralConfig", SHAPE | {"num_local_experts": 16}),
    "gpt_oss": Family(
        "GptOssConfig",
        SHAPE | {"num_local_experts": 16, "head_dim": 16},
        {
            "gate_proj": ("gate_up_proj", transposed(every_second(0))),
            "up_proj": ("gate_up_proj", transposed(every_second(1))),
            "down_proj": ("down_proj", transposed(whole)),
        },
    ),
    "llama4_text": Family(
        "Llama4TextConfig",
        SHAPE
        | {"num_local_experts": 16, "head_dim": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
        {
            "gate_proj": ("gate_up_proj", transposed(halves(0))),
            "up_proj": ("gate_up_proj", transposed(halves(1))),
            "down_proj": ("down_proj", transposed(whole)),
        },
    ),
    "granitemoe": Family(
        "GraniteMoeConfig",
        SHAPE | {"num_local_experts": 16},
        {
            "gate_proj": ("../input_linear.weight", halves(0)),
            "up_proj": ("../input_linear.weight", halves(1)),
            "down_proj": ("../output_linear.weight", whole),
        },
    ),
    "deepseek_v3": Family("DeepseekV3Config", LATENT),
    "glm4_moe": Family("Glm4MoeConfig", SMALL | {"n_routed_experts": 16, "first_k_dense_replace": 0}),
    "minimax": Family("MiniMaxConfig", SHAPE | {"num_local_experts": 16, "head_dim": 16}),
    "olmoe": Family("OlmoeConfig", SHAPE | {"num_experts": 16}),
    "jetmoe": Family(
        "JetMoeConfig",
        {k: v for k, v in SHAPE.items() if k != "num_attention_heads"}
        | {"kv_channels": 32, "num_local_experts": 16},
        {"": ("weight", whole)},
    ),
}
QUICK = ("qwen3_moe", "mixtral", "gpt_oss", "llama4_text")
IDS = torch.randint(2, 500, (2, 40), generator=torch.Generator().manual_seed(3))
_EXPERT = re.compile(r"(?P<parent>.+)\.(?P<expert>\d+)(?:\.(?P<role>[^.]+))?\Z")


def save_family(name: str, path: Path) -> Path:
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, family.config)(**family.fields)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def unpacked(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The (N, K) weight that 4-bit tensors of format gptq stand for, computed bit by bit."""
    words, zeros = (tensors[f"{name}.{part}"].numpy().view(np.uint32) for part in ("qweight", "qzeros"))
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    codes = (words[:, None] >> shifts[None, :, None] & 15).reshape(-1, words.shape[1]).astype(np.float64)
    stored = (zeros[:, :, None] >> shifts & 15).reshape(zeros.shape[0], -1)
    offsets = (stored + 1 & 15).astype(np.float64)
    g_idx = tensors[f"{name}.g_idx"].numpy()
    scales = tensors[f"{name}.scales"].double().numpy()
    return torch.from_numpy((codes - offsets[g_idx]) * scales[g_idx]).T.float()


def rounded(weight: Tensor, group: int = 32) -> Tensor:
    """Round to nearest in 4 bits, symmetric, (N, K)."""
    grouped = weight.reshape(weight.shape[0], -1, group)
    scale = 2 * grouped.abs().amax(-1, keepdim=True) / 15
    return ((grouped / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


def dense_files(
    family: Family, source: Path, packed: dict[str, Tensor], change: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The source's tensors with `change(name, weight)` in place of each weight that is packed."""
    dense = load_file(source / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in packed if key.endswith(".qweight")]:
        if f"{name}.weight" in dense:
            dense[f"{name}.weight"] = change(name, dense[f"{name}.weight"])
            continue
        found = _EXPERT.match(name)
        assert found is not None, name
        tensor, slot = family.merged[found["role"] or ""]
        parent = found["parent"]
        while tensor.startswith("../"):
            tensor, parent = tensor.removeprefix("../"), parent.rpartition(".")[0]
        place = slot(dense[f"{parent}.{tensor}"], int(found["expert"]))
        place.copy_(change(name, place.clone()))
    return dense


def logits_of(source: Path, tensors: dict[str, Tensor], path: Path) -> Tensor:
    """What Transformers computes with other tensors in the files of `source`."""
    path.mkdir()
    (path / "config.json").write_text((source / "config.json").read_text())
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    return logits(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits.float()


def divergence(dense: Tensor, other: Tensor) -> float:
    p, q = (x.log_softmax(-1) for x in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def block_share(source: Path, packed: dict[str, Tensor]) -> float:
    """Part of the parameters of two and three dimensions inside the blocks that is packed."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_config(config)
    inside = [p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim > 1]
    return sum(8 * v.numel() for k, v in packed.items() if k.endswith(".qweight")) / sum(inside)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_experts_are_quantized_one_by_one(name: str, text: Path, tmp_path: Path) -> None:
    family, source, out = FAMILIES[name], save_family(name, tmp_path / "m"), tmp_path / "q"
    made = gptq("quantize", source, "--out", out, "--calibration", text, *FAST, "--json")
    assert made.code == 0, made.stderr
    assert made.document["fallbacks"] == 0
    verified = gptq("load", out, "--verify", "--progress", "none", "--json")
    assert verified.code == 0, verified.stdout
    findings = [finding for check in verified.document["checks"] for finding in check["findings"]]
    assert [finding for finding in findings if finding["level"] != "note"] == []

    packed = load_file(out / "model.safetensors")
    assert block_share(source, packed) >= 0.97
    checkpoint = open_checkpoint(out, dtype="float32")
    assert checkpoint.keys.unexpected == ()
    loaded = logits(load_quantized(checkpoint, default_placement(checkpoint)))
    dense = logits_of(source, load_file(source / "model.safetensors"), tmp_path / "dense")
    expected = logits_of(
        source, dense_files(family, source, packed, lambda n, _: unpacked(packed, n)), tmp_path / "expected"
    )
    nearest = logits_of(
        source, dense_files(family, source, packed, lambda _, w: rounded(w)), tmp_path / "nearest"
    )
    assert float((loaded - expected).norm() / expected.norm()) < 1e-4
    assert divergence(dense, loaded) < divergence(dense, nearest)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_one_parameter_of_experts_may_stay_dense(name: str, tmp_path: Path) -> None:
    family, source, out = FAMILIES[name], save_family(name, tmp_path / "m"), tmp_path / "q"
    skeleton = opened(source)
    some = tuple(linear for linear in skeleton.linears if "down_proj" not in linear.name)
    assert 0 < len(some) < len(skeleton.linears)
    write_checkpoint(replace(skeleton, linears=some), out)
    checks = gptq("load", out, "--verify", "--progress", "none", "--json").document["checks"]
    headers = [f for c in checks if c["rule"] in ("files", "names", "coverage") for f in c["findings"]]
    assert [finding["message"] for finding in headers] == ["the linear is dense, as the config says"]
    packed = load_file(out / "model.safetensors")
    assert not [key for key in packed if "down_proj" in key and key.endswith("qweight")]
    checkpoint = open_checkpoint(out, dtype="float32")
    loaded = logits(load_quantized(checkpoint, default_placement(checkpoint)))
    expected = logits_of(
        source, dense_files(family, source, packed, lambda n, _: unpacked(packed, n)), tmp_path / "expected"
    )
    assert float((loaded - expected).norm() / expected.norm()) < 1e-4


def names(out: Path, start: str) -> set[str]:
    return {key for key in load_file(out / "model.safetensors") if key.startswith(start)}


PARTS = ("qweight", "qzeros", "scales", "g_idx")
NAMES = {
    "qwen3_moe": ("model.layers.1.mlp.experts.", ("gate_proj", "up_proj", "down_proj"), PARTS),
    "mixtral": ("model.layers.1.block_sparse_moe.experts.", ("w1", "w2", "w3"), PARTS),
    "gpt_oss": (
        "model.layers.1.mlp.experts.",
        ("gate_proj", "up_proj", "down_proj"),
        (*PARTS, "bias"),
    ),
    "granitemoe": (
        "model.layers.1.block_sparse_moe.experts.",
        ("gate_proj", "up_proj", "down_proj"),
        PARTS,
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_files(name: str, tmp_path: Path) -> None:
    source = save_family(name, tmp_path / "m")
    write_checkpoint(opened(source), tmp_path / "q")
    start, roles, parts = NAMES[name]
    assert names(tmp_path / "q", start) == {
        f"{start}{expert}.{role}.{part}" for expert in range(16) for role in roles for part in parts
    }
    config = json.loads((tmp_path / "q" / "quantize_config.json").read_text())
    assert not [key for key in config["dynamic"] if re.match(key.removeprefix("-:"), f"{start}3.{roles[0]}")]
    facts = target_facts(open_checkpoint(tmp_path / "q"))
    mixed = {leaf(linear.name) for linear in facts.linears if linear.interleaved}
    assert mixed == ({"gate_proj", "up_proj"} if name == "gpt_oss" else set())
    if name == "gpt_oss":
        merged = load_file(source / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj_bias"]
        stored = load_file(tmp_path / "q" / "model.safetensors")[f"{start}5.up_proj.bias"]
        assert torch.equal(stored, merged[5, 1::2])
