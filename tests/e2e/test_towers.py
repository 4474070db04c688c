"""Models with a tower beside their text decoder: the decoder is quantized, the rest is copied as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gptq_cli import load as load_model
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.config import ModelRef, QuantizeConfig
from gptq_cli.gptq.packing import PackedTensors, unpack
from gptq_cli.model.blocks import assign
from gptq_cli.model.expert_linears import unfuse
from gptq_cli.model.experts import find_experts
from gptq_cli.model.find import find_model
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import Skeleton, open_skeleton
from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, gptq
from tests.towers import CLASSES, TOWERS

SMALL = (*FAST, "--group-size", "16", "--recipe", "fast")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
BLOCKS = {"llama4": "language_model.model.layers", "blip-2": "language_model.model.decoder.layers"}
UNREACHED = {"mllama": "model.language_model.layers.1"}
"""A block that only an image reaches."""
EVAL = ("--seq-len", "32", "--windows", "2", "--progress", "none", "--json")

Made = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tiny: TinyFactory, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made("llava")`: the quantized checkpoint and its report, made once."""
    root, results = tmp_path_factory.mktemp("quantized"), {}

    def make(name: str) -> tuple[Path, Any]:
        if name not in results:
            results[name] = root / name, quantized(tiny(name), root / name, text)
        return results[name]

    return make


def quantized(source: Path, out: Path, text: Path, *more: object) -> Any:
    ran = gptq("quantize", source, "--out", out, "--calibration", text, *SMALL, "--json", *more)
    assert ran.code == 0, ran.stderr
    return ran.document


def skeleton_of(path: Path) -> Skeleton:
    ref = ModelRef(model=str(path))
    return select_linears(open_skeleton(find_model(ref), ref), QuantizeConfig(group_size=16))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in sorted(path.glob("*.safetensors")) for name, t in load_file(shard).items()}


@pytest.mark.parametrize("name", TOWERS)
def test_the_decoder_is_quantized_and_the_rest_is_kept(name: str, tiny: TinyFactory, made: Made) -> None:
    source = tiny(name)
    out, report = made(name)
    skeleton, before, after = skeleton_of(source), tensors_of(source), tensors_of(out)
    prefix = BLOCKS.get(name, "model.language_model.layers")
    assert skeleton.blocks_prefix == prefix
    assert all(linear.name.startswith(f"{prefix}.") for linear in skeleton.linears)
    assert not any(linear.name.startswith(UNREACHED.get(name, "-")) for linear in skeleton.linears)

    packed = {linear.source_name for linear in skeleton.linears}
    assert {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")} == packed
    dense = before.keys() - {linear.source_key for linear in skeleton.linears}
    assert dense == {name for name in after if name.rpartition(".")[2] not in PARTS}
    assert all(before[key].dtype == after[key].dtype for key in dense)
    assert all(torch.equal(before[key], after[key]) for key in dense)
    weights = sum(linear.in_features * linear.out_features for linear in skeleton.linears)
    share = weights / sum(tensor.numel() for tensor in before.values())
    assert report["quantized_share"] == pytest.approx(share, abs=0.01)

    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "gptq"
    assert config == json.loads((source / "config.json").read_text())
    verified = gptq("load", out, "--verify", "--json", "--progress", "none")
    assert verified.code == 0, verified.stderr
    levels = {f["level"] for check in verified.document["checks"] for f in check["findings"]}
    assert levels <= {"note"}


@pytest.mark.parametrize("name", ["gemma4", "qwen3_5", "llama4", "mllama", "blip-2", "qwen2_audio"])
def test_it_opens_with_its_own_class(name: str, tiny: TinyFactory, made: Made) -> None:
    out, _ = made(name)
    model = load_model(out)
    assert type(model).__name__ == CLASSES[name]
    dense = getattr(transformers, CLASSES[name]).from_pretrained(tiny(name)).eval()
    dequantize_into(dense, out)
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = (text_part(name, m)(input_ids=ids, use_cache=False).logits for m in (model, dense))
    assert torch.allclose(ours, theirs, atol=2e-3, rtol=2e-3)


def text_part(name: str, model: Any) -> Any:
    """BLIP-2 asks for an image; the language model in it does not."""
    return model.language_model if name == "blip-2" else model


def dequantize_into(model: Any, out: Path) -> None:
    """Put the values that the codes of a checkpoint stand for into a dense model."""
    checkpoint, tensors = open_checkpoint(out), tensors_of(out)
    unfuse(model, find_experts(model, checkpoint.blocks).experts)
    for info in (*checkpoint.linears, *checkpoint.experts):
        parts = {part: tensors[f"{info.source_name}.{part}"] for part in PARTS}
        sizes = (info.in_features, info.out_features)
        codes, zeros = unpack(PackedTensors(**parts), 4, checkpoint.checkpoint_format, *sizes)
        g = parts["g_idx"].long()
        values = (codes.float() - zeros.float()[:, g]) * parts["scales"].float().T[:, g]
        assign(model.get_submodule(info.name), values)


@pytest.mark.parametrize("name", ["qwen3_vl", "blip-2", "mllama"])
def test_it_is_measured_and_continues_a_prompt(name: str, tiny: TinyFactory, made: Made, text: Path) -> None:
    out, _ = made(name)
    words = ("--eval", text, "--against", tiny(name), "--prompt", "a", "--max-new-tokens", "3", "--bench")
    ran = gptq("load", out, *words, *EVAL)
    assert ran.code == 0, ran.stderr
    assert ran.document["new_tokens"] == 3
    assert 0 < ran.document["agreement"]["kl"] < 0.5


def test_streamed_and_resident_results_are_the_same(
    tiny: TinyFactory, text: Path, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptq_cli.placement.placement import Placement

    monkeypatch.setattr(Placement, "streams", lambda self, block: False)
    quantized(tiny("qwen2_5_vl"), tmp_path / "resident", text)
    streamed, resident = tensors_of(made("qwen2_5_vl")[0]), tensors_of(tmp_path / "resident")
    assert streamed.keys() == resident.keys()
    assert [name for name in streamed if not torch.equal(streamed[name], resident[name])] == []


@pytest.fixture
def with_mtp(tiny: TinyFactory, tmp_path: Path) -> Path:
    """Qwen3.5 with layers for multi-token prediction, which its class in Transformers does not read."""
    source = shutil.copytree(tiny("qwen3_5"), tmp_path / "mtp")
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"fc": (64, 128), "layers.0.mlp.up_proj": (128, 64), "norm": (64,)}.items():
        tensors[f"mtp.{name}.weight"] = torch.randn(shape, generator=generator)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_layers_for_multi_token_prediction_are_kept(with_mtp: Path, text: Path, tmp_path: Path) -> None:
    report = quantized(with_mtp, tmp_path / "q", text)
    before, after = tensors_of(with_mtp), tensors_of(tmp_path / "q")
    kept = [name for name in before if name.startswith("mtp.")]
    assert len(kept) == 3
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {"mtp", "model.visual"} <= set(report["dense_modules"])
    weights = sum(x.in_features * x.out_features for x in skeleton_of(with_mtp).linears)
    total = sum(tensor.numel() for tensor in before.values())
    assert report["quantized_share"] == pytest.approx(weights / total, rel=1e-6)

    form = open_checkpoint(tmp_path / "q").format
    assert all(form.of(name.removesuffix(".weight")) is None for name in kept)
    assert form.of("model.visual.blocks.0.attn.qkv") is None
    verified = gptq("load", tmp_path / "q", "--verify", "--json", "--progress", "none")
    names = next(check for check in verified.document["checks"] if check["rule"] == "names")
    assert [(f["level"], len(f["modules"])) for f in names["findings"]] == [("note", 3)]


def test_processors_are_kept_and_their_chat_template_is_used(
    tiny: TinyFactory, text: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny("llava"), tmp_path / "m")
    template = (
        "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    (source / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    quantized(source, tmp_path / "q", text)
    for name in ("chat_template.json", "preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (source / name).read_bytes()
    counts = []
    for more in ((), ("--raw",)):
        words = ("--prompt", "hello", "--max-new-tokens", "1", *more, "--json", "--progress", "none")
        ran = gptq("load", tmp_path / "q", *words)
        assert ran.code == 0, ran.stderr
        counts.append(ran.document["prompt_tokens"])
    assert counts[0] > counts[1]


def test_a_dtype_is_set_in_every_part_of_the_config(tiny: TinyFactory, text: Path, tmp_path: Path) -> None:
    quantized(tiny("qwen3_vl"), tmp_path / "q", text, "--dtype", "bfloat16")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}
