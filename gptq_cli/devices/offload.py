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

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import attach_align_device_hook_on_blocks, remove_hook_from_module
from accelerate.utils import extract_submodules_state_dict, find_tied_parameters, retie_parameters
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


def dispatch_modules(model: Any, placement: Placement, names: Iterable[str]) -> None:
    """Hang accelerate's dispatch hooks on the modules `names`, entries of the placement whose weights are
    where it says: what `accelerate.dispatch_model` does for all modules of a model.

    The other modules have no weights now, and who gives them some moves their inputs as well.
    """
    modules = {name for name, _ in model.named_modules() if name}
    wanted = [name for name in names if name in modules]  # a single tensor needs no hook: its module has one
    main = placement.main_device
    runs_on = {name: placement.device_of(name) for name in wanted}
    offload = {name: device == CPU and main != CPU for name, device in runs_on.items()}
    on_cpu = [name for name, moved in offload.items() if moved]
    tied = find_tied_parameters(model)
    attach_align_device_hook_on_blocks(
        model,
        execution_device={
            "": main.for_accelerate,
            **{n: (main if offload[n] else device).for_accelerate for n, device in runs_on.items()},
        },
        offload=offload,
        weights_map=extract_submodules_state_dict(model.state_dict(), on_cpu),
        skip_keys=model._skip_keys_device_placement,
    )
    retie_parameters(model, tied)


@contextmanager
def replace_dispatch_hooks(
    model: nn.Module,
    placement: Placement,
    execution_device: object = None,
    *,
    only: Collection[str] | None = None,
) -> Iterator[OffloadChain]:
    """Replace the dispatch hooks of the placement's cpu entries by an offload chain inside the `with`.

    `execution_device`: a `Device`, `torch.device`, int or string; None: the placement's main device. Where
    everything is on one device, nothing is changed. `only`: leave the other entries alone.
    """
    wanted = placement.main_device if execution_device is None else execution_device
    device = torch_device(Device.parse(wanted, accelerator_kind()))
    entries = [name for name in placement.offloaded if only is None or name in only]
    if placement.main_device == CPU:
        entries = []
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
