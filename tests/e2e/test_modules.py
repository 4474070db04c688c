"""Settings by module and a quantized head, from the command line to a checkpoint that is opened again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, gptq
from tests.model.test_gates import DELTA
from tests.model.test_selection import save
from tests.tiny import save_tokenizer

MEASURE = ("--seq-len", "48", "--windows", "4", "--progress", "none", "--json")
DOWN = "model.layers.*.mlp.down_proj"


def kl(out: Path, model: Path, text: Path) -> float:
    loaded = gptq("load", out, "--against", model, "--eval", text, *MEASURE)
    assert loaded.code == 0, loaded.stderr
    return float(loaded.document["agreement"]["kl"])


def test_mixed_settings(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    words = ("quantize", tiny_llama, "--calibration", text, *FAST, "--json", "--recipe", "fast")
    rules = (
        *("--module", f"{DOWN}=bits:8,group:64", "--module", "model.layers.0.self_attn=dense"),
        *("--module", "model.layers.2.mlp.down_proj=bits:4", "--quantize-head"),
    )
    plan = gptq(*words, *rules, "--dry-run").document
    made = gptq(*words, *rules, "--out", tmp_path / "mixed")
    assert made.code == 0, made.stderr
    report = made.document
    linears = [linear for block in report["blocks"] for linear in block["linears"]]
    bits = {linear["name"]: (linear["bits"], linear["group_size"]) for linear in linears}
    assert len(bits) == 17
    assert bits["model.layers.1.mlp.down_proj"] == (8, 64)
    assert bits["model.layers.2.mlp.down_proj"] == (4, 64)
    assert bits["model.layers.2.mlp.up_proj"] == (4, 32)
    assert (report["head"]["name"], report["head"]["bits"]) == ("lm_head", 8)
    assert {one["name"]: one["linears"] for one in report["kept_dense"]} == {
        f"model.layers.0.self_attn.{name}_proj": 1 for name in "qkvo"
    }
    assert report["own_settings"] == plan["plan"]["own_settings"]
    assert report["kept_dense"] == plan["kept_dense"]
    assert report["bits_per_weight"] == pytest.approx(plan["plan"]["bits_per_weight"])
    assert report["quantized_share"] == pytest.approx(plan["plan"]["quantized_share"])
    assert plan["plan"]["head"] == ["lm_head", 64, 512]
    for size in ("size_after_bytes", "bits_per_parameter"):  # headers included
        assert plan["plan"][size] == report[size]

    verified = gptq("load", tmp_path / "mixed", "--verify", "--json", "--progress", "none")
    assert verified.code == 0, verified.stdout
    plain = gptq(*words, "--out", tmp_path / "plain")
    assert plain.code == 0, plain.stderr
    assert kl(tmp_path / "mixed", tiny_llama, text) < kl(tmp_path / "plain", tiny_llama, text)


def test_a_tied_head(tiny: TinyFactory, text: Path, tmp_path: Path) -> None:
    model, out = tiny("llama_tied"), tmp_path / "q"
    words = ("quantize", model, "--calibration", text, *FAST, "--recipe", "fast")
    made = gptq(*words, "--out", out, "--quantize-head", "--json", "--target", "gptqmodel")
    assert made.code == 0, made.stderr
    assert made.document["head"]["loss"] < 1e-4
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    verified = gptq("load", out, "--verify", "--target", "vllm", "--json", "--progress", "none")
    assert verified.code == 0, verified.stdout
    assert gptq(*words, "--out", tmp_path / "plain", "--json").code == 0
    head, plain = kl(out, model, text), kl(tmp_path / "plain", model, text)
    assert head == pytest.approx(plain, rel=0.1)  # 8 bits of the head cost next to nothing
    refused = gptq(*words, "--out", tmp_path / "r", "--quantize-head", "--target", "transformers")
    assert refused.code == 3
    assert "--no-quantize-head" in refused.stderr


def test_gates_stay_dense_in_the_checkpoint(text: Path, tmp_path: Path) -> None:
    model = save(tmp_path / "m", "Qwen3_5TextConfig", **DELTA, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    save_tokenizer(model)
    shown = gptq("inspect-map", model, "--json", "--progress", "none").document
    reasons = {one["name"]: one["reason"] for one in shown["kept_dense"]}
    assert reasons == {f"model.layers.*.linear_attn.in_proj_{name}": "its output only gates" for name in "ab"}
    out = tmp_path / "q"
    made = gptq("quantize", model, "--out", out, "--calibration", text, *FAST, "--recipe", "fast", "--json")
    assert made.code == 0, made.stderr
    assert {one["name"] for one in made.document["kept_dense"]} == set(reasons)
    assert gptq("load", out, "--verify", "--json", "--progress", "none").code == 0
    assert kl(out, model, text) < 0.1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--module", "model.layers.*.mlp.dwn_proj=bits:8"), 3, "model.layers.*.mlp.down_proj"),
        (("--module", f"{DOWN}=bits:5"), 2, "bits is 5; allowed: 2, 3, 4, 8"),
        (("--module", f"{DOWN}=group:48"), 3, "group size 48 does not divide the input columns 128"),
        (("--module", "lm_head=bits:8"), 3, "--quantize-head"),
        (("--module", "model.layers.*.mlp.up_proj=bits:8", "--target", "vllm"), 3, "load them as one matrix"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], code: int, message: str, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    ran = gptq("quantize", tiny_llama, "--out", tmp_path / "q", "--calibration", text, *FAST, *words)
    assert ran.code == code
    assert message in ran.stderr
