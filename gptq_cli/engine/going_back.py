"""Backward passes through one block: the same every time, where torch can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gptq_cli.devices.deterministic import deterministic, not_deterministic
from gptq_cli.devices.host_buffers import to_device


class GoingBack:
    """Backward passes through a block: the same every time, where torch can."""

    def __init__(
        self, block: nn.Module, device: torch.device, again: Callable[[], None] = lambda: None
    ) -> None:
        """`again`: forget what the first pass added up, before kernels that may differ do it over."""
        self._block, self._device, self._again = block, device, again
        self.plain = False
        """A function in it has no kernel that gives the same gradient every time."""

    def __call__(self, run: Callable[[Tensor], Tensor], hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to `hidden`, which enters, from that with respect to what `run` makes of
        it; both on the device afterwards."""
        if not self.plain:
            try:
                return self.strictly(run, hidden, gradient)
            except RuntimeError as error:
                if not not_deterministic(error):
                    raise
            self.plain = True
            self._again()
        return self._pass(run, hidden, gradient)

    def strictly(self, run: Callable[[Tensor], Tensor], hidden: Tensor, gradient: Tensor) -> Tensor:
        """The same; raises a `RuntimeError` of which `not_deterministic` is true where torch cannot."""
        with deterministic(self._device):
            return self._pass(run, hidden, gradient)

    def _pass(self, run: Callable[[Tensor], Tensor], hidden: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad(), _attributes_kept(self._block):
            entering = to_device(hidden, self._device).detach().requires_grad_()
            run(entering).backward(to_device(gradient, self._device))  # type: ignore[no-untyped-call]
        assert entering.grad is not None
        return entering.grad


@contextmanager
def _attributes_kept(block: nn.Module) -> Iterator[None]:
    """Afterwards tensors that modules keep as attributes (states of a recurrence) are what they were: those
    of a forward with gradients would hold on to all of it."""
    before = {module: dict(vars(module)) for module in block.modules()}
    buffers = {module: dict(module._buffers) for module in block.modules()}
    try:
        yield
    finally:
        for module, held in before.items():
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value is not held.get(name):
                    if name in held:
                        vars(module)[name] = held[name]
                    else:
                        del vars(module)[name]
            module._buffers.update(buffers[module])
