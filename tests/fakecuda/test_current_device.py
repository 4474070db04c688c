"""The device that a block works on is the current one while it works: Triton kernels go by that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.engine import mixed
from gptq_cli.gptq.walk import launching_on
from gptq_cli.model.streamed import StreamedReader
from tests.e2e.commands import gptq
from tests.fakecuda.runs import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

Tiny = Callable[..., Path]
Calls = list[tuple[int | None, int, str]]
"""(device of the input, the current one, thread) of each call of a norm: no hook of ours is on these."""


@pytest.fixture
def calls() -> Iterator[Calls]:
    seen: Calls = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        tensor = args[0] if args else None
        if isinstance(tensor, Tensor) and tensor.is_cuda and "Norm" in type(module).__name__:
            thread = threading.current_thread().name
            seen.append((tensor.device.index, torch.accelerator.current_device_index(), thread))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    yield seen
    handle.remove()


MAPS = ("cuda:1", "model.layers.1=1,rest=0", "model.layers.0=0,model.layers.1=cpu,rest=1")


@pytest.mark.parametrize("device_map", MAPS)
@pytest.mark.parametrize("options", [(), ("--no-true-sequential",)], ids=["parked", "replayed"])
def test_while_quantizing(
    device_map: str, options: tuple[str, ...], calls: Calls, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    quantize(tiny("llama"), tmp_path / "out", text, "--device-map", device_map, *options)
    assert [call for call in calls if call[0] != call[1]] == []
    assert {call[0] for call in calls} == ({1} if device_map == "cuda:1" else {0, 1})
    parked = any(thread == "gptq-forward" for _, _, thread in calls)
    assert parked is not bool(options)


@pytest.mark.parametrize("device_map", ["cuda:1", "model.layers.0=0,rest=1"])
def test_while_reading_ahead(
    device_map: str, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread waits for copies to the device, and must not wake another one."""
    seen: list[tuple[str, int]] = []
    read = StreamedReader.read_ahead

    def noted(*words: Any) -> Any:
        seen.append((threading.current_thread().name, torch.accelerator.current_device_index()))
        return read(*words)

    monkeypatch.setattr(StreamedReader, "read_ahead", noted)
    quantize(tiny("llama"), tmp_path / "out", text, "--device-map", device_map)
    assert seen == [(f"gptq-read model.layers.{index}", 1) for index in (1, 2)]


def test_while_solving(monkeypatch: pytest.MonkeyPatch, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    solve = mixed.quantize_linears

    def noted(weights: list[Tensor], *args: Any, **options: Any) -> Any:
        seen.append((weights[0].device.index, torch.accelerator.current_device_index()))
        return solve(weights, *args, **options)

    monkeypatch.setattr(mixed, "quantize_linears", noted)
    quantize(tiny("llama"), tmp_path / "out", text, "--device-map", "model.layers.1=1,rest=0")
    assert {here for here, _ in seen} == {0, 1}
    assert all(here == current for here, current in seen)


def test_a_kernel_is_launched_where_its_tensors_are() -> None:
    """Whoever calls the solver: the probe of the time does, before any block is worked on."""
    with launching_on(torch.ones(1, device="cuda:1")):
        assert torch.accelerator.current_device_index() == 1
    with launching_on(torch.ones(1)):
        assert torch.accelerator.current_device_index() == 0


@pytest.mark.parametrize("device_map", MAPS)
def test_while_loaded(device_map: str, calls: Calls, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    done = quantize(tiny("llama", dtype=torch.bfloat16), tmp_path / "out", text, "--device-map", "cpu")
    words = ("--prompt", "the model", "--max-new-tokens", 3, "--eval", text, "--windows", 2, "--seq-len", 32)
    ran = gptq("load", done.out, "--device-map", device_map, *words, "--progress", "none")
    assert ran.code == 0, ran.stderr
    assert calls
    assert [call for call in calls if call[0] != call[1]] == []
