"""Modules that are stored on the CPU and run on an accelerator, while a model is quantized.

accelerate dispatches a model by its map with an `AlignDevicesHook` on every module. For a cpu entry that hook
keeps the weights on the meta device between forwards, so there is nothing to quantize. While the `with` below
is open, each cpu entry instead

    1  loses its dispatch hooks (`remove_hook_from_module(recurse=True)`); its weights are back on the CPU
    2  becomes a link of a `cpu_offload_with_hook` chain in execution order: its forward moves it to the
       execution device and the module before it (`prev_module_hook`) back to the CPU

A module without parameters, such as `model.rotary_emb`, never becomes a link: `CpuOffload.pre_forward` calls
`next(module.parameters())`, which raises StopIteration. Its buffers move to the execution device instead.

The execution device is passed as a `torch.device` with its index: accelerate compares it with a parameter's
device, and an int or a string would never be equal. When the `with` ends, normally or by an exception, every
cpu entry is on the CPU, without a hook, and its `forward` is its class's own again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from torch import nn

from gptq_cli.devices.accelerators import accelerator_kind, torch_device
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import Placement

_STORAGE_DEVICE = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class OffloadChain:
    """The cpu entries of a model, which `device` runs. Empty where nothing is offloaded."""

    device: torch.device
    hooked: tuple[str, ...]
    """Links of the chain, in execution order."""
    skipped: tuple[str, ...]
    """Entries without parameters: their buffers are on `device`, they have no hook."""
    _modules: dict[str, nn.Module]

    @contextmanager
    def on_device(self, name: str) -> Iterator[None]:
        """Keep the module `name` on the execution device inside the `with`, and on the CPU afterwards.

        A module that is not a link of the chain is not moved.
        """
        module = self._modules.get(name)
        if module is None:
            yield
            return
        try:
            module.to(self.device)
            yield
        finally:
            module.to(_STORAGE_DEVICE)

    @contextmanager
    def for_capture(self) -> Iterator[None]:
        """Let the chain run inside the `with`; every link is on the CPU afterwards."""
        try:
            yield
        finally:
            self.return_to_cpu()

    def return_to_cpu(self) -> None:
        """Move every link to the CPU: the chain itself leaves the last one that ran on the execution
        device."""
        for module in self._modules.values():
            module.to(_STORAGE_DEVICE)


@contextmanager
def replace_dispatch_hooks(
    model: nn.Module, placement: Placement, execution_device: object = None
) -> Iterator[OffloadChain]:
    """Replace the dispatch hooks of the placement's cpu entries by an offload chain inside the `with`.

    `execution_device`: a `Device`, `torch.device`, int or string; None: the placement's main device. Where
    everything is on one device, nothing is changed.
    """
    wanted = placement.main_device if execution_device is None else execution_device
    device = torch_device(Device.parse(wanted, accelerator_kind()))
    entries = placement.offloaded if placement.main_device != CPU else ()
    modules = {name: model.get_submodule(name) for name in entries}
    links = {name: module for name, module in modules.items() if _has_parameters(module)}
    skipped = tuple(name for name in modules if name not in links)
    with ExitStack() as undo:
        previous: Any = None
        for name, module in modules.items():
            undo.callback(_restore, module)
            remove_hook_from_module(module, recurse=True)
            if name in links:
                _, previous = cpu_offload_with_hook(module, device, prev_module_hook=previous)
            else:
                module.to(device)
        yield OffloadChain(device, tuple(links), skipped, links)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _restore(module: nn.Module) -> None:
    """Remove the hook, move the tensors to the CPU, and leave the module as it was."""
    remove_hook_from_module(module, recurse=True)
    module.to(_STORAGE_DEVICE)
    for part in module.modules():
        forward = part.__dict__.get("forward")
        if isinstance(forward, MethodType) and forward.__func__ is type(part).forward:
            del part.forward
