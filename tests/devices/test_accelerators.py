"""Readings and flushes without an accelerator, and with one that is made up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from gptq_cli.devices import accelerators
from gptq_cli.devices.accelerators import (
    PYTHONS_OWN,
    accelerator_kind,
    current_accelerator,
    flush,
    frozen_gc,
    present_devices,
    read_memory,
    reset_peak,
    torch_device,
    working_on,
)
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.placement.device import CPU, Device

GIB = 1 << 30


@pytest.fixture
def none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def two_xpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two accelerators of 16 GiB; 4 GiB reserved of which 1 allocated on each; calls are noted."""
    calls: list[str] = []
    fake: dict[str, Any] = {
        "current_accelerator": lambda: torch.device("xpu"),
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device_index": lambda: 1,
        "get_memory_info": lambda index: (10 * GIB, 16 * GIB),
        "memory_allocated": lambda index: 1 * GIB,
        "memory_reserved": lambda index: 4 * GIB,
        "max_memory_allocated": lambda index: 2 * GIB,
        "reset_peak_memory_stats": lambda index: calls.append(f"reset {index}"),
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    monkeypatch.setattr(accelerators, "clear_device_cache", lambda: calls.append("clear"))
    return calls


@pytest.mark.usefixtures("none")
def test_without_an_accelerator() -> None:
    assert current_accelerator() == CPU
    assert accelerator_kind() == "cuda"
    (budget,) = present_devices()
    assert budget.device == CPU
    assert 0 < budget.free_bytes <= budget.total_bytes


@pytest.mark.usefixtures("none")
def test_cpu_reading_is_the_resident_set() -> None:
    (memory,) = read_memory([CPU])
    assert memory.device == "cpu"
    assert memory.allocated_bytes == memory.reserved_bytes > 10_000_000
    assert memory.peak_bytes >= memory.allocated_bytes
    assert memory.total_bytes > memory.peak_bytes
    reset_peak([CPU])
    assert read_memory([CPU])[0].peak_bytes >= memory.allocated_bytes


@pytest.mark.usefixtures("none")
def test_flush_collects_garbage_and_reads_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(accelerators.gc, "collect", lambda: calls.append("collect"))
    monkeypatch.setattr(accelerators, "clear_device_cache", lambda: calls.append("clear"))
    monkeypatch.setattr(accelerators, "trim_heap", lambda: calls.append("trim"))
    before, after = flush([CPU])
    assert calls == ["collect", "clear", "trim"]
    assert [m.device for m in before] == [m.device for m in after] == ["cpu"]


def test_with_accelerators(two_xpus: list[str]) -> None:
    assert current_accelerator() == Device("xpu", 1)
    assert accelerator_kind() == "xpu"
    budgets = present_devices()
    assert [str(b.device) for b in budgets] == ["xpu:0", "xpu:1", "cpu"]
    assert budgets[0].free_bytes == 13 * GIB, "reserved but not allocated memory is free for us"
    (memory,) = read_memory([Device("xpu", 0)])
    assert (memory.allocated_bytes, memory.reserved_bytes, memory.peak_bytes, memory.total_bytes) == (
        1 * GIB,
        4 * GIB,
        2 * GIB,
        16 * GIB,
    )


def test_peaks_are_reset_on_accelerators_alone(two_xpus: list[str]) -> None:
    reset_peak([Device("xpu", 1), CPU])
    assert two_xpus == ["reset 1"]


def test_flush_clears_every_backend_once(two_xpus: list[str]) -> None:
    before, after = flush(iter([Device("xpu", 0), Device("xpu", 1), CPU]))
    assert two_xpus == ["clear"]
    assert [m.device for m in before] == [m.device for m in after] == ["xpu:0", "xpu:1", "cpu"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.1 GB, max allowed: 9.07 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_lack_of_memory_is_known_in_every_wording(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("memory")]
)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_current_device_is_set_where_there_are_several(
    two_xpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[int] = []
    monkeypatch.setattr(
        torch.accelerator, "device_index", lambda index: entered.append(index) or nullcontext()
    )
    for device in ("xpu:1", "cpu", "meta", "cuda:1"):
        with working_on(torch.device(device)):
            pass
    assert entered == [1]


@pytest.mark.parametrize("device", [CPU, Device("cuda", 3), Device("mps")])
def test_torch_device(device: Device) -> None:
    assert Device.parse(torch_device(device)) == device


class TestFrozen:
    @pytest.fixture(autouse=True)
    def as_it_was(self) -> Iterator[None]:
        """The session's own objects are frozen (tests/conftest.py)."""
        gc.unfreeze()
        yield
        gc.freeze()

    def test_objects_from_before_are_left_out_and_come_back(self) -> None:
        own = gc.get_freeze_count()
        with frozen_gc():
            assert gc.get_freeze_count() > PYTHONS_OWN
        assert gc.get_freeze_count() == own

    def test_a_process_of_few_objects_is_left_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gptq_cli.devices.accelerators.MANY_OBJECTS", 1 << 30)
        own = gc.get_freeze_count()
        with frozen_gc():
            assert gc.get_freeze_count() == own

    def test_garbage_from_inside_is_collected(self) -> None:
        with frozen_gc():
            circle: list[Any] = [Marked()]
            circle.append(circle)
            gone = weakref.ref(circle[0])
            del circle
            gc.collect()
            assert gone() is None

    def test_what_the_process_has_frozen_itself_stays_so(self) -> None:
        gc.freeze()
        own = gc.get_freeze_count()
        with frozen_gc():
            assert gc.get_freeze_count() == own
        assert gc.get_freeze_count() == own


class Marked:
    """Something that can be referred to weakly."""
