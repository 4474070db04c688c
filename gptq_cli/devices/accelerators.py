"""Memory of the devices, on every backend that torch and accelerate know.

Accelerators are read through `torch.accelerator`, so cuda (and ROCm, which calls itself cuda), xpu, npu and
the others need no branch; mps has no statistics of its own there and is read through `torch.mps`. For the
CPU, allocated = reserved = resident set size of the process, and the peak is the highest since the job began.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate.utils.memory import clear_device_cache

from gptq_cli.devices.host_memory import host_memory, peak_resident_bytes, resident_bytes, trim_heap
from gptq_cli.events import DeviceMemory
from gptq_cli.placement.device import CPU, INDEXED_KINDS, VISIBLE_VARIABLES, Device
from gptq_cli.placement.placement import DeviceBudget


def accelerator_kind() -> str:
    """The kind that a bare index means on this machine: that of its accelerators, "cuda" where it has
    none."""
    current = torch.accelerator.current_accelerator()
    return current.type if current is not None else "cuda"


def current_accelerator() -> Device:
    """The accelerator that torch would use now, with its index; the CPU where there is none."""
    current = torch.accelerator.current_accelerator()
    if current is None or not torch.accelerator.is_available():
        return CPU
    if current.type not in INDEXED_KINDS:
        return Device(current.type)
    return Device(current.type, torch.accelerator.current_device_index())


def torch_device(device: Device) -> torch.device:
    """The same device in torch's type."""
    return torch.device(str(device))


def working_on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one of its kind, in this thread, inside the scope.

    PyTorch's own operators run on the device of their tensors. Triton kernels, which some models use, are
    launched on the current device, wherever their tensors are; and a new thread starts on device 0.
    """
    if device.type not in INDEXED_KINDS or device.type != accelerator_kind():
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def synchronize(device: torch.device) -> None:
    """Wait until everything that was started on `device` is done; a CPU has nothing waiting."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def present_accelerators() -> tuple[Device, ...]:
    """Every accelerator of this machine that is visible to the process."""
    current = torch.accelerator.current_accelerator()
    if current is None or not torch.accelerator.is_available():
        return ()
    if current.type not in INDEXED_KINDS:
        return (Device(current.type),)
    return tuple(Device(current.type, index) for index in range(torch.accelerator.device_count()))


def name_on_machine(device: Device) -> str:
    """What an accelerator is called outside of this process: as the variable that makes it visible calls it,
    else by its number."""
    visible = next((os.environ[name] for name in VISIBLE_VARIABLES if os.environ.get(name)), "")
    names = [name.strip() for name in visible.split(",")] if visible else []
    index = device.index or 0
    return names[index] if index < len(names) else str(index)


def present_devices() -> tuple[DeviceBudget, ...]:
    """Every accelerator, then the CPU, see `budgets_of`."""
    return budgets_of(present_accelerators())


def budgets_of(accelerators: Iterable[Device]) -> tuple[DeviceBudget, ...]:
    """These, then the CPU, with total and free bytes. To ask an accelerator takes some of its memory.

    Memory that torch's own allocator holds but does not use counts as free.
    """
    budgets = []
    for device in accelerators:
        memory = _read_accelerator(device)
        if device.kind == "mps":
            free = memory.total_bytes - memory.allocated_bytes
        else:
            free_now, _ = torch.accelerator.get_memory_info(device.index)
            free = free_now + memory.reserved_bytes - memory.allocated_bytes
        budgets.append(DeviceBudget(device, memory.total_bytes, max(0, free)))
    host = host_memory()
    return (*budgets, DeviceBudget(CPU, host.total_bytes, host.free_bytes))


def read_memory(devices: Iterable[Device]) -> tuple[DeviceMemory, ...]:
    """One reading per device, in the order given."""
    return tuple(_read_accelerator(d) if d.is_accelerator else _read_host(d) for d in devices)


def reset_peak(devices: Iterable[Device]) -> None:
    """Start a new peak on each accelerator; the CPU's is reset once per job, by `reset_peak_resident`."""
    for device in devices:
        if device.is_accelerator and device.kind != "mps":
            torch.accelerator.reset_peak_memory_stats(device.index)


MANY_OBJECTS = 50_000
"""A collection goes through fewer in some milliseconds, and nothing is gained by freezing them."""
PYTHONS_OWN = 10_000
"""Python may freeze some hundred objects of its own when it starts; more have been frozen on purpose."""


@contextmanager
def frozen_gc() -> Iterator[None]:
    """Exclude the objects alive now from Python's garbage collections inside this scope.

    A process with torch and transformers holds a million objects, and traversing them takes 0.3 s: as long as
    the solve of a small block, at every flush. Objects created inside the scope are collected as usual. Where
    the process has frozen its objects itself, that is left as it is.
    """
    few = len(gc.get_objects(generation=2)) < MANY_OBJECTS  # counting the frozen ones takes longer
    if few or gc.get_freeze_count() > PYTHONS_OWN:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def flush(devices: Iterable[Device]) -> tuple[tuple[DeviceMemory, ...], tuple[DeviceMemory, ...]]:
    """Collect garbage and empty the caches of every backend; return the readings before and after."""
    devices = tuple(devices)
    before = read_memory(devices)
    gc.collect()
    free_workspaces()
    clear_device_cache()
    trim_heap()
    return before, read_memory(devices)


def free_workspaces() -> None:
    """Give back what cuBLAS keeps for each thread that multiplied, also for those that wait or are gone:
    32 MiB on Hopper. Torch allocates it again where it is needed.

    Without it, 16 forwards that waited held 512 MiB, and the engine's thread 32 (measured on an H200). Torch
    has no public name for it.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        clear()


def _read_host(device: Device) -> DeviceMemory:
    resident = resident_bytes()
    return DeviceMemory(
        device=str(device),
        allocated_bytes=resident,
        reserved_bytes=resident,
        peak_bytes=peak_resident_bytes(),
        total_bytes=host_memory().total_bytes,
    )


def _read_accelerator(device: Device) -> DeviceMemory:
    if device.kind == "mps":
        allocated = torch.mps.current_allocated_memory()
        return DeviceMemory(
            device=str(device),
            allocated_bytes=allocated,
            reserved_bytes=torch.mps.driver_allocated_memory(),
            peak_bytes=allocated,
            total_bytes=torch.mps.recommended_max_memory(),
        )
    _, total = torch.accelerator.get_memory_info(device.index)
    return DeviceMemory(
        device=str(device),
        allocated_bytes=torch.accelerator.memory_allocated(device.index),
        reserved_bytes=torch.accelerator.memory_reserved(device.index),
        peak_bytes=torch.accelerator.max_memory_allocated(device.index),
        total_bytes=total,
    )
