"""`gptq quantize` and `gptq load`, from the model directory to the checkpoint and back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import gptq_cli.checkpoint.writer as writer_module
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.devices import fp32_matmul as products
from gptq_cli.engine.opening import EngineRun
from gptq_cli.gptq import hessian
from gptq_cli.gptq import matmul as precision
from gptq_cli.gptq.packing import PackedTensors, unpack
from gptq_cli.jobs import quantizing
from gptq_cli.model.blocks import assign
from gptq_cli.model.expert_linears import unfuse
from gptq_cli.model.experts import find_experts
from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, Ran, gptq
from tests.tiny import TINY, save_tokenizer


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_quantizes_and_loads(
    name: str, tiny: TinyFactory, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    made = gptq("quantize", tiny(name), "--out", out, "--calibration", text, *FAST, "--json")
    assert made.code == 0, made.stderr
    report = made.document
    losses = [
        (linear["loss"], linear["rtn_loss"]) for block in report["blocks"] for linear in block["linears"]
    ]
    checkpoint = open_checkpoint(out)
    assert len(losses) == len(checkpoint.linears) + len(checkpoint.experts)
    assert sum(loss for loss, _ in losses) < 0.8 * sum(rtn for _, rtn in losses)
    assert report["fallbacks"] == 0
    assert json.loads((out / "report.json").read_text())["dataset_sha256"] == report["dataset_sha256"]
    assert leftovers(tmp_path) == ["q"]

    loaded = gptq(
        "load", out, "--eval", text, "--seq-len", "48", "--windows", "4", "--progress", "none", "--json"
    )
    assert loaded.code == 0, loaded.stderr
    assert loaded.document["linears"] == len(losses)
    assert loaded.document["perplexity"] == pytest.approx(dense_perplexity(tiny(name), out, text), rel=2e-3)


def evaluated(out: Path, text: Path) -> Ran:
    """`gptq load OUT --eval TEXT` over four windows."""
    words = ("--seq-len", "48", "--windows", "4", "--progress", "none", "--json")
    return gptq("load", out, "--eval", text, *words)


def dense_perplexity(model: Path, out: Path, text: Path) -> float:
    """Perplexity of the dense model with the checkpoint's dequantized weights put in by Transformers."""
    from gptq_cli.calibration import evaluation_windows, open_tokenizer
    from gptq_cli.evaluation.perplexity import perplexity

    twin = AutoModelForCausalLM.from_pretrained(model).eval()
    checkpoint = open_checkpoint(out)
    tensors = load_file(out / "model.safetensors")
    unfuse(twin, find_experts(twin, checkpoint.blocks).experts)
    for info in (*checkpoint.linears, *checkpoint.experts):
        packed = {
            part: tensors[f"{info.source_name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
        }
        codes, zeros = unpack(
            PackedTensors(**packed),
            4,
            checkpoint.checkpoint_format,
            info.in_features,
            info.out_features,
        )
        g = packed["g_idx"].long()
        weight = (codes.float() - zeros.float()[:, g]) * packed["scales"].float().T[:, g]
        assign(twin.get_submodule(info.name), weight)
    windows = evaluation_windows(open_tokenizer(model), str(text), 48, 4)
    return perplexity(twin, windows.input_ids).value


OPTIONS = {
    "bits 2": ("--bits", "2"),
    "bits 3": ("--bits", "3"),
    "bits 8": ("--bits", "8"),
    "asym": ("--asym",),
    "asym bits 3": ("--asym", "--bits", "3"),
    "desc_act": ("--desc-act",),
    "one group a row": ("--group-size", "-1"),
    "block-wise": ("--no-true-sequential",),
    "dense target": ("--solve-for", "dense"),
    "no order": ("--act-order", "none"),
}


@pytest.mark.parametrize("words", OPTIONS.values(), ids=OPTIONS)
def test_every_option_gives_a_checkpoint_that_loads(
    words: tuple[str, ...], tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    made = gptq("quantize", tiny_llama, "--out", out, "--calibration", text, *FAST, *words, "--json")
    assert made.code == 0, made.stderr
    config = json.loads((out / "quantize_config.json").read_text())
    assert config == json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == ("gptq_v2" if "--asym" in words else "gptq")
    assert config["desc_act"] is ("--desc-act" in words)
    loaded = gptq(
        "load", out, "--eval", text, "--seq-len", "48", "--windows", "2", "--progress", "none", "--json"
    )
    assert loaded.code == 0, loaded.stderr
    assert loaded.document["bits"] == config["bits"]
    linears = [linear for block in made.document["blocks"] for linear in block["linears"]]
    assert sum(x["loss"] for x in linears) < sum(x["rtn_loss"] for x in linears)
    if words == ("--desc-act",):
        g_idx = load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
        assert not torch.equal(g_idx, g_idx.sort().values)


def test_two_runs_are_byte_identical(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    for name in "ab":
        assert gptq("quantize", tiny_llama, "--out", tmp_path / name, "--calibration", text, *FAST).code == 0
    for path in (tmp_path / "a").iterdir():
        if path.name != "report.json":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def linears_of(model: Path, text: Path, out: Path, *words: object) -> list[dict[str, Any]]:
    """What report.json says of every linear of a short run."""
    report = gptq("quantize", model, "--out", out, "--calibration", text, *FAST, *words, "--json").document
    return [linear for block in report["blocks"] for linear in block["linears"]]


@pytest.mark.parametrize("name", ["llama", "opt"])  # opt flattens its samples before the MLP
def test_micro_batches_do_not_change_the_result(
    name: str, tiny: TinyFactory, text: Path, tmp_path: Path
) -> None:
    ran = {
        batch: linears_of(tiny(name), text, tmp_path / str(batch), "--batch-size", batch)
        for batch in (1, 3, 8)
    }
    for batch in (3, 8):
        for field, bound in (("loss", 2e-2), ("alpha", 5e-2)):
            ours, theirs = ([linear[field] for linear in ran[number]] for number in (batch, 1))
            assert ours == pytest.approx(theirs, rel=bound, abs=1e-4), field


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_parked_and_replayed_forwards_write_the_same_bytes(
    name: str, tiny: TinyFactory, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears_of(tiny(name), text, tmp_path / "parked")
    run = quantizing.quantize_model

    def replayed(engine_run: EngineRun, *others: Any) -> Any:
        blocks = tuple(replace(block, replayed="memory") for block in engine_run.schedule.blocks)
        return run(replace(engine_run, schedule=replace(engine_run.schedule, blocks=blocks)), *others)

    monkeypatch.setattr(quantizing, "quantize_model", replayed)
    linears_of(tiny(name), text, tmp_path / "replayed")
    parked, replayed = ((tmp_path / way / "model.safetensors").read_bytes() for way in ("parked", "replayed"))
    assert parked == replayed


def test_threads_change_no_more_than_rounding(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    before, losses = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            losses.append([x["loss"] for x in linears_of(tiny_llama, text, tmp_path / str(threads))])
    finally:
        torch.set_num_threads(before)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_costs_little_with_and_without_units(
    units: bool, tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products on bf16 units, or formed in fp32 and rounded: both stay near the run in float32."""
    for module in (precision, products, hessian):
        monkeypatch.setattr(module, "fast_matmul_supported", lambda *_: units)
    full = linears_of(tiny_llama, text, tmp_path / "full", "--dtype", "float32")
    half = linears_of(tiny_llama, text, tmp_path / "half", "--dtype", "bfloat16")
    total, base = (sum(linear["loss"] for linear in linears) for linears in (half, full))
    assert total == pytest.approx(base, rel=0.1)


def test_what_is_said_of_the_forwards_is_what_happens(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    words = ("quantize", tiny_llama, "--calibration", text, *FAST[:-1], "plain")
    assert "passes one per block, 8 samples at a time" in gptq(*words, "--out", tmp_path / "a").stderr
    planned = json.loads((tmp_path / "a" / "report.json").read_text())["schedule"]
    assert planned["micro_batch_samples"] == 8
    assert [block["replayed"] for block in planned["blocks"]] == [None] * 3
    options = ("--no-true-sequential", "--batch-size", "1")
    said = gptq(*words, "--out", tmp_path / "b", *options).stderr
    assert "passes several per block because of --no-true-sequential, 1 sample at a time" in said


def damaged(model: Path, tmp_path: Path, name: str, value: float) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    name: str, value: float, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    model = damaged(tiny_llama, tmp_path, name, value)
    ran = gptq("quantize", model, "--out", tmp_path / "q", "--calibration", text, *FAST)
    assert ran.code == 5
    assert name in ran.stderr
    assert leftovers(tmp_path) == ["damaged"]


def test_a_full_disk_is_said_and_leaves_nothing(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, "write_at", full)
    ran = gptq("quantize", tiny_llama, "--out", tmp_path / "q", "--calibration", text, *FAST)
    assert ran.code == 1
    assert "no space left" in ran.stderr
    assert leftovers(tmp_path) == []


def test_overwrite_replaces_and_only_when_asked(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    words = ("quantize", tiny_llama, "--out", tmp_path / "q", "--calibration", text, *FAST)
    assert gptq(*words).code == 0
    before = (tmp_path / "q" / "model.safetensors").read_bytes()
    refused = gptq(*words, "--bits", "8")
    assert refused.code == 3
    assert "--overwrite" in refused.stderr
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == before
    assert gptq(*words, "--bits", "8", "--overwrite").code == 0
    assert (tmp_path / "q" / "model.safetensors").read_bytes() != before
    assert leftovers(tmp_path) == ["q"]


def test_the_default_group_size_is_one_that_divides(tmp_path: Path, text: Path) -> None:
    """As SmolLM2, whose 576 columns 128 does not divide: the defaults work all the same."""
    fields = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**fields, vocab_size=512, tie_word_embeddings=True))
    source, out = tmp_path / "m", tmp_path / "q"
    model.save_pretrained(source)
    save_tokenizer(source)
    words = ("--calibration", text, "--samples", "8", "--seq-len", "48")
    made = gptq("quantize", source, "--out", out, *words, "--progress", "plain", "--json")
    assert made.code == 0, made.stderr
    assert "group 64 (auto: the largest of 128, 64, 32 that divides every linear)" in made.stderr
    report = made.document
    assert report["group_size"] == report["settings"]["group_size"] == 64
    for file in ("config.json", "quantize_config.json"):
        held = json.loads((out / file).read_text())
        assert held.get("quantization_config", held)["group_size"] == 64
    files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert report["size_after_bytes"] == files
    assert report["bits_per_parameter"] == 8 * files / model.num_parameters()
    assert report["bits_per_parameter"] > report["bits_per_weight"]


def test_two_equal_runs_write_equal_bytes_but_for_the_report(
    tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "a" / "q", tmp_path / "b" / "q"]
    for out in folders:
        out.parent.mkdir()
        assert gptq("quantize", tiny_llama, "--out", out, "--calibration", text, *FAST).code == 0
    files = [{p.name: p.read_bytes() for p in out.iterdir() if p.name != "report.json"} for out in folders]
    assert files[0] == files[1]
