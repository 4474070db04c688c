"""How the model calls a block: all arguments, of which one carries the hidden states.

A block may be run more than once on the same arguments: it is traced, and where forwards are replayed it runs
again for each stage. What a run writes into its arguments (keys and values that later blocks share, a state
that is updated in place) must not be there in the next run, so every run but the last gets copies: a
*rehearsal*. Containers are copied, tensors only for a block that is known to write into them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.devices.fp32_matmul import matmul_scope
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.errors import GptqError
from gptq_cli.model.flow import Carrier, argument, hidden_in, tensors_in

UNSUPPORTED = "this architecture cannot be quantized block by block; report it with the model's config.json"


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How the model calls one block for one micro-batch, the hidden states left out."""

    args: tuple[Any, ...]
    """Positional arguments, those before and after the hidden states."""
    kwargs: dict[str, Any]
    carrier: Carrier = 0
    """The position or the keyword under which the hidden states are passed."""
    writes: bool = False
    """The block writes into its arguments in place."""
    hidden_only: bool = False
    """Nothing but the hidden states of what it returns is handed on, so nothing else is held: some blocks
    return the scores of their attention beside them."""

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Run `block` on `hidden`, most often (batch, seq_len, hidden_size), and return what it returns."""
        output = self._run(block, hidden)
        return hidden_of(output) if self.hidden_only else output

    def _run(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        args, kwargs = self.args, self.kwargs
        if isinstance(self.carrier, int):
            args = (*args[: self.carrier], hidden, *args[self.carrier :])
        else:
            kwargs = {self.carrier: hidden, **kwargs}
        with matmul_scope(hidden.dtype, hidden.device):
            return block(*args, **kwargs)

    def rehearse(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Run `block` on copies, so that it can be run again on what was there before."""
        copies: dict[int, Any] = {}
        call = replace(
            self,
            args=_copied(self.args, copies, self.writes),
            kwargs=_copied(self.kwargs, copies, self.writes),
        )
        return call(block, hidden.clone() if self.writes else hidden)

    def to(self, device: torch.device) -> BlockCall:
        """The same call with every tensor on `device`; what the block can write into stays the same object,
        see `moved`."""
        return replace(self, args=moved(self.args, device), kwargs=moved(dict(self.kwargs), device))


def taken(
    args: tuple[Any, ...], kwargs: dict[str, Any], carrier: Carrier
) -> tuple[Tensor | None, tuple[Any, ...], dict[str, Any]]:
    """The hidden states among the arguments of a block, None where there are none; and the others."""
    found = argument(args, kwargs, carrier)
    if not isinstance(found, Tensor):
        return None, args, kwargs
    if isinstance(carrier, int):
        return found, (*args[:carrier], *args[carrier + 1 :]), kwargs
    return found, args, {name: value for name, value in kwargs.items() if name != carrier}


def hidden_of(output: object) -> Tensor:
    """The hidden states in what a block returned: the tensor itself, or the first of a tuple."""
    first = hidden_in(output)
    if first is None:
        raise GptqError(
            f"a decoder block returned {type(output).__name__}; expected a tensor or a tuple of tensors",
            hint=UNSUPPORTED,
        )
    return first


def moved(value: Any, device: torch.device, seen: set[int] | None = None) -> Any:
    """`value` with every tensor in it on `device`; `value` itself where they all are.

    What a block can write into, and later blocks read (lists, mappings, objects with tensors), stays the same
    object: its tensors are replaced in it. `seen`: objects that have been looked at.
    """
    if isinstance(value, Tensor):
        return to_device(value, device)
    seen = set() if seen is None else seen
    if isinstance(value, tuple):
        items = [moved(item, device, seen) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, list):
        value[:] = [moved(item, device, seen) for item in value]
    elif isinstance(value, MutableMapping):
        _replace_in(value, device, seen)
    elif not _is_plain(value):
        _replace_in(vars(value), device, seen)
    return value


def _replace_in(held: MutableMapping[Any, Any], device: torch.device, seen: set[int]) -> None:
    for key, item in list(held.items()):
        new = moved(item, device, seen)
        if new is not item:
            held[key] = new


def _copied(value: Any, copies: dict[int, Any], tensors: bool) -> Any:
    """Containers and objects that hold tensors are copied, at every depth; tensors only where `tensors`."""
    if isinstance(value, Tensor):
        if not tensors:
            return value
        return copies.setdefault(id(value), value.clone())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(item, copies, tensors) for item in value))
    if isinstance(value, tuple):
        return tuple(_copied(item, copies, tensors) for item in value)
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, list):
        return copies.setdefault(id(value), [_copied(item, copies, tensors) for item in value])
    if isinstance(value, dict):
        new = copies.setdefault(id(value), copy.copy(value))
        new.update({key: _copied(item, copies, tensors) for key, item in value.items()})
        return new
    if _is_plain(value):
        return value
    new = copies.setdefault(id(value), copy.copy(value))
    new.__dict__.update({key: _copied(item, copies, tensors) for key, item in vars(value).items()})
    return new


def _is_plain(value: Any) -> bool:
    """No object with a state of its own that a block could change (a cache, a mapping)."""
    if isinstance(value, nn.Module | type) or callable(value) or not hasattr(value, "__dict__"):
        return True
    return not isinstance(value, Mapping) and next(tensors_in(value), None) is None
