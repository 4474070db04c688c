"""Wherever a model is quantized, the checkpoint is the one that the CPU gives: every code, every tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptq_cli.gptq import tuning as tuning_maths
from tests.encoders import STYLES, store_in_few_bits
from tests.fakecuda.devices import Devices
from tests.fakecuda.runs import BLOCKS, OUTER, Reference, different, group_size_for, quantize

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

Tiny = Callable[..., Path]


MAPS = {
    "one device": ("rest=0", ["cuda:0"]),
    "the second device": ("rest=1", ["cuda:1"]),
    "cpu and a device": ("{blocks}.1=cpu,rest=0", ["cuda:0", "cpu"]),
    "all blocks on cpu": ("{blocks}=cpu,rest=0", ["cuda:0", "cpu"]),
    "cpu and the second device": ("{blocks}.0=cpu,rest=1", ["cuda:1", "cpu"]),
    "outer modules on cpu": ("{outer},rest=0", ["cuda:0", "cpu"]),
    "two devices": ("{blocks}.1=1,rest=0", ["cuda:0", "cuda:1"]),
    "two devices and cpu": ("{blocks}.0=1,{blocks}.1=cpu,rest=0", ["cuda:0", "cuda:1", "cpu"]),
}


ESSENTIAL = ("cpu and a device", "outer modules on cpu", "two devices", "two devices and cpu")
"""For every architecture; the others for llama."""


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in BLOCKS for case in (MAPS if name == "llama" else ESSENTIAL)]
)
def test_a_map_changes_nothing(
    name: str, case: str, tiny: Tiny, text: Path, tmp_path: Path, reference: Reference
) -> None:
    spec, expected = MAPS[case]
    outer = ",".join(f"{module}=cpu" for module in OUTER[name])
    device_map = spec.format(blocks=BLOCKS[name], outer=outer)
    options = ("--group-size", group_size_for(name))
    run = quantize(tiny(name), tmp_path / "out", text, "--device-map", device_map, *options)
    assert run.devices == expected
    assert different(run, reference(name, *options)) == []


@pytest.mark.parametrize("name", BLOCKS)
def test_one_block_a_device(
    name: str, tiny: Tiny, text: Path, tmp_path: Path, reference: Reference, devices: Devices
) -> None:
    count = 3 if name == "llama" else 2
    devices.resize([2 << 30] * count)
    spec = ",".join(f"{BLOCKS[name]}.{index}={index}" for index in range(count))
    options = ("--group-size", group_size_for(name))
    run = quantize(tiny(name), tmp_path / "out", text, "--device-map", f"{spec},rest=0", *options)
    assert run.devices == [f"cuda:{index}" for index in range(count)]
    assert different(run, reference(name, *options)) == []


@pytest.mark.parametrize("name", BLOCKS)
def test_a_map_changes_nothing_of_gradients_and_tuning(
    name: str,
    tiny: Tiny,
    text: Path,
    tmp_path: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of gradients are rounded otherwise on a device than on the CPU, so the run on one device is the
    measure, and that on the CPU is near. What was tuned is taken, though it may gain nothing."""
    monkeypatch.setattr(tuning_maths, "LEAST_GAIN", -1.0)
    recipe = ("--recipe", "max", "--samples", "12", "--bits", "2")
    options = (*recipe, "--group-size", group_size_for(name))
    alone, spread = (
        quantize(tiny(name), tmp_path / str(number), text, "--device-map", spec, *options)
        for number, spec in enumerate(("rest=0", MAPS["two devices and cpu"][0].format(blocks=BLOCKS[name])))
    )
    assert alone.devices == ["cuda:0"]
    assert spread.devices == ["cuda:0", "cuda:1", "cpu"]
    assert different(spread, alone) == []
    found, on_cpu = (run.report["tuning"] for run in (alone, reference(name, *options)))
    assert found["steps"] == on_cpu["steps"] > 0
    assert found["part"] == on_cpu["part"] > 0
    assert found["kl_before"] == pytest.approx(on_cpu["kl_before"], rel=0.1)
    ours, theirs = (tuning["kl_after"] / tuning["kl_before"] for tuning in (found, on_cpu))
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_so_with_weights_in_few_bits(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """Where devices have a part each, the weights are decoded here, not by Transformers."""
    sources = store_in_few_bits(tiny("llama", dtype=torch.bfloat16), tmp_path, STYLES["fp8-blocks"])
    for number, case in enumerate(("one device", "two devices and cpu", "outer modules on cpu")):
        spec, expected = MAPS[case]
        device_map = spec.format(blocks=BLOCKS["llama"], outer="model.embed_tokens=cpu")
        coded, decoded = (
            quantize(source, tmp_path / f"{source.name}-{number}", text, "--device-map", device_map)
            for source in sources
        )
        assert coded.devices == decoded.devices == expected
        assert different(coded, decoded) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--no-true-sequential",),
        ("--desc-act", "--asym"),
        ("--solve-for", "own", "--batch-size", "2"),
        ("--bits", "3", "--group-size", "-1"),
    ],
    ids=" ".join,
)
def test_so_with_other_options(
    options: tuple[str, ...], tiny: Tiny, text: Path, tmp_path: Path, reference: Reference
) -> None:
    device_map = "model.layers.0=1,model.layers.1=cpu,rest=0"
    run = quantize(tiny("llama"), tmp_path / "out", text, "--device-map", device_map, *options)
    assert run.devices == ["cuda:0", "cuda:1", "cpu"]
    assert different(run, reference("llama", *options)) == []


HEADS = [("llama", "two devices"), ("llama", "outer modules on cpu"), ("llama", "two devices and cpu")]


@pytest.mark.parametrize(("name", "case"), HEADS)
def test_so_with_a_quantized_head(
    name: str, case: str, tiny: Tiny, text: Path, tmp_path: Path, reference: Reference
) -> None:
    spec, expected = MAPS[case]
    outer = ",".join(f"{module}=cpu" for module in OUTER[name])
    device_map = spec.format(blocks=BLOCKS[name], outer=outer)
    options = ("--quantize-head", "--module", f"{BLOCKS[name]}.1=bits:8")
    run = quantize(tiny(name), tmp_path / "out", text, "--device-map", device_map, *options)
    assert run.devices == expected
    assert different(run, reference(name, *options)) == []


@pytest.mark.parametrize(
    "device_map",
    [
        "model.visual=cpu,model.language_model.layers.1=1,rest=0",
        "model.visual=1,model.language_model.layers.0=cpu,rest=0",
    ],
)
def test_so_with_a_tower(
    device_map: str, tiny: Tiny, text: Path, tmp_path: Path, reference: Reference
) -> None:
    options = ("--group-size", group_size_for("qwen3_vl"))
    run = quantize(tiny("qwen3_vl"), tmp_path / "out", text, "--device-map", device_map, *options)
    assert run.devices == ["cuda:0", "cuda:1", "cpu"]
    assert different(run, reference("qwen3_vl", *options)) == []
