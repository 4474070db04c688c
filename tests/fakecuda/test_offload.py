"""The life of the offload hooks on devices: before a run, after success, an error, an interruption."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from torch import nn

from gptq_cli.engine import block, run
from gptq_cli.model import block_stream
from tests.e2e.commands import gptq
from tests.fakecuda.devices import Devices
from tests.fakecuda.runs import quantize, words_for

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

Tiny = Callable[..., Path]
MAP = "model.layers.1=cpu,model.norm=cpu,model.rotary_emb=cpu,rest=1"
OFFLOADED = ("model.rotary_emb", "model.layers.1", "model.norm")


class Watch:
    """The model of a run, and what hung on its cpu entries when the block loop began."""

    model: nn.Module
    links: list[str]
    hooked_by_accelerate: bool


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    seen = Watch()
    replace, blocks = block_stream.replace_dispatch_hooks, run.quantize_blocks

    def replaced(model: nn.Module, *args: Any, **options: Any) -> Any:
        seen.model = model
        modules = [[*model.get_submodule(name).modules()] for name in OFFLOADED]
        seen.hooked_by_accelerate = all(any(hasattr(p, "_hf_hook") for p in parts) for parts in modules)
        return replace(model, *args, **options)

    def begun(*args: Any, **options: Any) -> Any:
        hooks = {name: getattr(seen.model.get_submodule(name), "_hf_hook", None) for name in OFFLOADED}
        seen.links = [name for name, hook in hooks.items() if isinstance(hook, CpuOffload)]
        return blocks(*args, **options)

    monkeypatch.setattr(block_stream, "replace_dispatch_hooks", replaced)
    monkeypatch.setattr(run, "quantize_blocks", begun)
    return seen


def assert_at_home_without_hooks(watch: Watch) -> None:
    assert watch.hooked_by_accelerate, "accelerate's dispatch hung a hook on every cpu entry"
    assert watch.links == ["model.layers.1", "model.norm"], "the chain, without the module without parameters"
    for name in OFFLOADED:
        module = watch.model.get_submodule(name)
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"cpu"}
        for part in module.modules():
            assert not {"_hf_hook", "_old_forward", "forward"} & part.__dict__.keys()


def at_block(number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do `act` when the first linear of the block of this number is packed."""
    pack = block.pack
    count = iter(range(10_000))

    def acting(*args: Any) -> Any:
        if next(count) == 7 * number:
            act()
        return pack(*args)

    monkeypatch.setattr(block, "pack", acting)


def test_after_success(watch: Watch, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    done = quantize(tiny("llama"), tmp_path / "out", text, "--device-map", MAP)
    assert done.devices == ["cuda:1", "cpu"]
    assert_at_home_without_hooks(watch)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_after_an_error(
    block: int, watch: Watch, monkeypatch: pytest.MonkeyPatch, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    at_block(block, fail, monkeypatch)
    ran = gptq(*words_for(tiny("llama"), tmp_path / "out", text, "--device-map", MAP))
    assert ran.code == 1, ran.stderr
    assert_at_home_without_hooks(watch)
    assert list(tmp_path.iterdir()) == ([tmp_path / ".out.gptq"] if block else [])  # finished blocks are kept


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_an_interruption(
    number: int,
    block: int,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Tiny,
    text: Path,
    tmp_path: Path,
) -> None:
    at_block(block, lambda: os.kill(os.getpid(), number), monkeypatch)
    ran = gptq(*words_for(tiny("llama"), tmp_path / "out", text, "--device-map", MAP), interrupted=True)
    assert ran.code == 130, ran.stderr
    assert_at_home_without_hooks(watch)
    assert list(tmp_path.iterdir()) == [tmp_path / ".out.gptq"]  # finished blocks are kept


def test_after_a_lack_of_memory(
    devices: Devices,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Tiny,
    text: Path,
    tmp_path: Path,
) -> None:
    at_block(1, lambda: devices.squeeze(1, 0), monkeypatch)
    ran = gptq(*words_for(tiny("llama"), tmp_path / "out", text, "--device-map", MAP))
    assert ran.code == 4, ran.stderr
    assert_at_home_without_hooks(watch)


@pytest.mark.parametrize(
    "device_map", ["cuda:1", MAP, "model.embed_tokens=cpu,rest=1", "model.layers=cpu,rest=1"]
)
def test_nothing_is_on_a_device_that_the_map_leaves_out(
    device_map: str, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    done = quantize(tiny("llama"), tmp_path / "out", text, "--device-map", device_map)
    assert "cuda:0" not in done.devices
    assert torch.cuda.max_memory_allocated(1) > 0
    assert torch.cuda.max_memory_allocated(0) == 0


def test_disk_is_refused(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    for device_map in ("model.layers.2=disk,rest=0", "model.layers.1=cpu,model.layers.2=disk,rest=0", "disk"):
        ran = gptq(*words_for(tiny("llama"), tmp_path / "out", text, "--device-map", device_map))
        assert ran.code == 3
        assert "disk offload is not supported with GPTQ quantization" in ran.stderr
    assert list(tmp_path.iterdir()) == []
    assert torch.cuda.max_memory_allocated(0) == 0


def test_cpu_beside_a_device_is_warned_of_on_stderr(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    done = quantize(tiny("llama"), tmp_path / "out", text, "--device-map", MAP, "--progress", "plain")
    assert "CPU offload is not recommended: 3 modules" in done.ran.stderr
    assert "execute on cuda:1" in done.ran.stderr
    plain = quantize(tiny("llama"), tmp_path / "cpu", text, "--device-map", "cpu", "--progress", "plain")
    assert "not recommended" not in plain.ran.stderr


def test_cpu_beside_a_device_is_warned_of_wherever_warnings_go(
    tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    done = quantize(tiny("llama"), tmp_path / "out", text, "--device-map", MAP, "--progress", "none")
    assert any("CPU offload is not recommended" in warning for warning in done.report["warnings"])
    assert "CPU offload is not recommended" in done.ran.stderr


def test_libraries_say_nothing_of_it(
    tiny: Tiny, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """accelerate's own line says that parameters are on the meta device, and frightens people."""
    done = quantize(tiny("llama"), tmp_path / "out", text, "--device-map", MAP)
    assert done.ran.stderr == "" or "not recommended" in done.ran.stderr
    loaded = gptq("load", done.out, "--device-map", MAP, "--progress", "none")
    assert loaded.code == 0, loaded.stderr
    assert [record.getMessage() for record in caplog.records if record.name.startswith("accelerate")] == []
