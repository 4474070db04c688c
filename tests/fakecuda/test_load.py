"""`gptq load` on devices: where the model goes and why, which kernel serves, what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_cli.inference.packed_linear import PackedLinear
from gptq_cli.jobs import loading
from tests.e2e.commands import Ran, gptq
from tests.fakecuda import operators
from tests.fakecuda.devices import Devices
from tests.fakecuda.runs import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

Tiny = Callable[..., Path]
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The checkpoint of a tiny model in a dtype, made once on the CPU."""
    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[tuple[object, ...], Path] = {}

    def make(name: str = "llama", dtype: torch.dtype = torch.bfloat16, *options: str) -> Path:
        key = (name, dtype, *options)
        if key not in made:
            out = root / str(len(made))
            made[key] = quantize(tiny(name, dtype=dtype), out, text, "--device-map", "cpu", *options).out
        return made[key]

    return make


def load(out: Path, text: Path, *words: object) -> Ran:
    """`gptq load` with a perplexity, as JSON."""
    measured = ("--eval", text, "--windows", 4, "--seq-len", 48)
    return gptq("load", out, *measured, "--json", "--progress", "none", *words)


def loaded(out: Path, text: Path, *words: object) -> Any:
    ran = load(out, text, *words)
    assert ran.code == 0, ran.stderr
    return ran.document


def test_without_a_map_it_goes_to_the_current_device(checkpoint: Checkpoint, text: Path) -> None:
    found = loaded(checkpoint(), text)
    assert found["device_map"] == "cuda:0"
    assert found["device_reason"] == "no device map was given: cuda:0 is the current accelerator"
    with torch.accelerator.device_index(1):
        found = loaded(checkpoint(), text)
    assert found["device_map"] == "cuda:1"
    assert "cuda:1 is the current accelerator" in found["device_reason"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("device_map", ["cuda:0", "cuda:1", "{blocks}.1=1,rest=0", "{blocks}.1=cpu,rest=0"])
def test_what_comes_out_is_what_the_cpu_says(
    name: str, device_map: str, checkpoint: Checkpoint, text: Path
) -> None:
    out = checkpoint(name, torch.float32)
    spec = device_map.format(blocks="transformer.h" if name == "gpt2" else "model.layers")
    words = ("--prompt", "the model reads", "--max-new-tokens", 6)
    host = loaded(out, text, "--device-map", "cpu", *words)
    found = loaded(out, text, "--device-map", spec, *words)
    assert found["text"] == host["text"]
    assert found["perplexity"] == pytest.approx(host["perplexity"], rel=1e-5)
    assert torch.cuda.memory_allocated(0) == torch.cuda.memory_allocated(1) == 0
    if device_map == "cuda:1":
        assert torch.cuda.max_memory_allocated(0) == 0


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel", "reason"),
    [
        ((8, 0), torch.bfloat16, "cuda-int4", "bfloat16 on CUDA"),
        ((9, 0), torch.bfloat16, "cuda-int4", "bfloat16 on CUDA"),
        ((7, 5), torch.bfloat16, "dequantize", "needs compute capability 8.0"),
        ((8, 0), torch.float16, "dequantize", "for bfloat16 only, not for float16"),
        ((8, 0), torch.float32, "dequantize", "for bfloat16 only, not for float32"),
    ],
)
def test_the_kernel_follows_from_device_and_dtype(
    capability: tuple[int, int],
    dtype: torch.dtype,
    kernel: str,
    reason: str,
    devices: Devices,
    checkpoint: Checkpoint,
    text: Path,
) -> None:
    devices.resize([4 << 30, 4 << 30], capability)
    out = checkpoint("llama", dtype)
    found = loaded(out, text)
    assert [entry["kernel"] for entry in found["kernels"]] == [kernel]
    assert all(reason in entry["reason"] for entry in found["kernels"])
    dense = loaded(out, text, "--kernel", "dequantize")
    assert {entry["kernel"] for entry in dense["kernels"]} == {"dequantize"}
    assert found["perplexity"] == pytest.approx(dense["perplexity"], rel=0.02)


@pytest.mark.parametrize(
    "options", [(), ("--bits", "8"), ("--bits", "3"), ("--asym",), ("--desc-act",)], ids=" ".join
)
def test_int4_kernels_serve_what_a_checkpoint_may_be(
    options: tuple[str, ...], checkpoint: Checkpoint, text: Path
) -> None:
    out = checkpoint("llama", torch.bfloat16, *options)
    found, dense = loaded(out, text), loaded(out, text, "--kernel", "dequantize")
    assert [entry["kernel"] for entry in found["kernels"]] == ["cuda-int4"]
    assert found["perplexity"] == pytest.approx(dense["perplexity"], rel=0.02)


def failing(*args: object) -> torch.Tensor:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore words")


def missing(*args: object) -> torch.Tensor:
    raise NotImplementedError(
        "Could not run 'aten::_weight_int4pack_mm' with arguments from the 'CUDA' backend"
    )


@pytest.mark.parametrize("name", ["convert_weight_to_int4pack", "weight_int4pack_mm"])
@pytest.mark.parametrize("broken", [failing, missing])
def test_an_operator_that_raises_at_load_is_done_without(
    name: str,
    broken: Callable[..., torch.Tensor],
    checkpoint: Checkpoint,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = loaded(checkpoint(), text, "--kernel", "dequantize")
    monkeypatch.setattr(operators, name, broken)
    found = loaded(checkpoint(), text, "--prompt", "the model", "--max-new-tokens", 4)
    assert [entry["kernel"] for entry in found["kernels"]] == ["dequantize"]
    (entry,) = found["kernels"]
    assert entry["reason"].startswith("torch's operator for cuda-int4 fails: ")
    assert "more words" not in entry["reason"]
    assert found["perplexity"] == dense["perplexity"]


def test_a_layout_that_is_not_understood_is_done_without(
    checkpoint: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = loaded(checkpoint(), text, "--kernel", "dequantize")
    own = operators.convert_weight_to_int4pack
    monkeypatch.setattr(
        operators, "convert_weight_to_int4pack", lambda pairs, inner: own(pairs, inner) & 0x0F
    )
    found = loaded(checkpoint(), text)
    assert [entry["kernel"] for entry in found["kernels"]] == ["dequantize"]
    assert "layout" in found["kernels"][0]["reason"]
    assert found["perplexity"] == dense["perplexity"]


def test_an_operator_that_raises_later_is_done_without(
    checkpoint: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It worked when the kernels were timed, and fails at the first token."""
    own, opened = operators.weight_int4pack_mm, loading._opened

    def broken_after(*args: Any) -> Any:
        made = opened(*args)
        monkeypatch.setattr(operators, "weight_int4pack_mm", failing)
        return made

    words = ("--prompt", "the model reads", "--max-new-tokens", 6)
    whole = loaded(checkpoint(), text, *words)
    monkeypatch.setattr(loading, "_opened", broken_after)
    found = loaded(checkpoint(), text, *words)
    assert operators.weight_int4pack_mm is not own
    assert [entry["kernel"] for entry in found["kernels"]] == ["dequantize"]
    assert found["kernels"][0]["reason"].startswith("torch's operator for cuda-int4 fails")
    assert found["text"] == whole["text"]


def test_a_lack_of_memory_is_no_operator_that_fails(
    devices: Devices, checkpoint: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = PackedLinear.__init__

    def squeezed(*args: Any, **options: Any) -> None:
        devices.squeeze(0, 0)
        own(*args, **options)

    monkeypatch.setattr(PackedLinear, "__init__", squeezed)
    ran = load(checkpoint(), text)
    assert ran.code == 4, ran.stderr
    assert "out of memory" in ran.stderr
    assert torch.cuda.memory_allocated(0) == 0


@pytest.mark.parametrize(
    "device_map",
    ["model.layers.1=cpu,rest=0", "model.embed_tokens=cpu,lm_head=cpu,rest=1", "model.layers=cpu,rest=1"],
)
def test_cpu_entries_are_brought_in_by_hooks(
    device_map: str, checkpoint: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    opened = loading._opened

    def kept(*args: Any) -> Any:
        made = opened(*args)
        models.append(made[0])
        return made

    monkeypatch.setattr(loading, "_opened", kept)
    whole = loaded(checkpoint(), text, "--device-map", "cuda:0")
    found = loaded(checkpoint(), text, "--device-map", device_map)
    assert found["device_map"] == f"cuda:{device_map[-1]}, cpu"
    assert {entry["kernel"] for entry in found["kernels"]} == {"cuda-int4"}
    assert found["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-3)
    model = models.pop()
    offloaded = [rule.partition("=")[0] for rule in device_map.split(",") if rule.endswith("=cpu")]
    for name in offloaded:
        part = model.get_submodule(name)
        assert all(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))
        assert any(hasattr(module, "_hf_hook") for module in part.modules())
    models.clear()


@pytest.mark.parametrize("device_map", ["cuda:0", "cuda:1", "cpu", "model.layers.1=1,rest=0"])
def test_sampling_leaves_no_generator_changed(device_map: str, checkpoint: Checkpoint, text: Path) -> None:
    out = checkpoint()
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    words = ("--prompt", "the model", "--temperature", "1.0", "--seed", "5", "--max-new-tokens", 8)
    first = loaded(out, text, "--device-map", device_map, *words)
    torch.cuda.manual_seed_all(99)
    torch.cuda.set_rng_state_all(states[1:])
    assert loaded(out, text, "--device-map", device_map, *words)["text"] == first["text"]
    left = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    assert all(torch.equal(before, after) for before, after in zip(states, left, strict=True))


def test_an_agreement_with_the_dense_model_beside_it(checkpoint: Checkpoint, tiny: Tiny, text: Path) -> None:
    dense = tiny("llama", dtype=torch.bfloat16)
    found = loaded(checkpoint(), text, "--against", dense, "--bench")
    assert found["agreement"]["kl"] < 1.0
    assert torch.cuda.memory_allocated(0) == 0
