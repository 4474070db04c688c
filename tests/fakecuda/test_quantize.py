"""Wherever a model is quantized, the checkpoint is the one that the CPU gives: every code, every tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.placement.device import Device
from tests.encoders import STYLES, store_in_few_bits
from tests.fakecuda.devices import Devices
from tests.fakecuda.runs import BLOCKS, OUTER, Quantized, different, quantize
from tests.gpu.limits import largest_limit

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

Tiny = Callable[..., Path]
Reference = Callable[..., Quantized]
CUDA = (Device("cuda", 0), Device("cuda", 1))


@pytest.fixture(scope="module")
def reference(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The checkpoint of the CPU alone, made once for each model and set of options."""
    root = tmp_path_factory.mktemp("reference")
    made: dict[tuple[str, ...], Quantized] = {}

    def run(name: str, *options: str) -> Quantized:
        key = (name, *options)
        if key not in made:
            made[key] = quantize(tiny(name), root / str(len(made)), text, "--device-map", "cpu", *options)
            assert made[key].devices == ["cpu"]
        return made[key]

    return run


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
    run = quantize(tiny(name), tmp_path / "out", text, "--device-map", device_map)
    assert run.devices == expected
    assert different(run, reference(name)) == []


@pytest.mark.parametrize("name", BLOCKS)
def test_one_block_a_device(
    name: str, tiny: Tiny, text: Path, tmp_path: Path, reference: Reference, devices: Devices
) -> None:
    count = 3 if name == "llama" else 2
    devices.resize([2 << 30] * count)
    spec = ",".join(f"{BLOCKS[name]}.{index}={index}" for index in range(count))
    run = quantize(tiny(name), tmp_path / "out", text, "--device-map", f"{spec},rest=0")
    assert run.devices == [f"cuda:{index}" for index in range(count)]
    assert different(run, reference(name)) == []


@pytest.mark.parametrize(
    ("name", "strategy", "wanted"),
    [
        ("gpt2", "auto", CUDA[:1]),
        ("gpt2", "balanced", CUDA),
        ("mixtral", "balanced", CUDA),
        ("llama", "auto", CUDA[:1]),
        ("llama", "balanced_low_0", CUDA[1:]),
        ("gemma2", "sequential", CUDA[:1]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(map(str, value)),
)
def test_a_strategy_changes_nothing(
    name: str,
    strategy: str,
    wanted: tuple[Device, ...],
    tiny: Tiny,
    text: Path,
    tmp_path: Path,
    reference: Reference,
) -> None:
    work = CalibrationConfig(samples=8, seq_len=48), QuantizeConfig(group_size=32)
    given = largest_limit(tiny(name), strategy, wanted, 2, *work)
    options = ("--device-map", strategy, "--max-memory", given)
    run = quantize(tiny(name), tmp_path / "out", text, *options)
    assert run.devices == [str(device) for device in wanted]
    assert different(run, reference(name)) == []


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
    options = ("--group-size", "16")
    run = quantize(tiny("qwen3_vl"), tmp_path / "out", text, "--device-map", device_map, *options)
    assert run.devices == ["cuda:0", "cuda:1", "cpu"]
    assert different(run, reference("qwen3_vl", *options)) == []
