"""Which linears are read rather than called.

Some architectures take the weight of a linear and multiply with it themselves (Mamba's `dt_proj`, absorbed
latent attention). Such a linear never sees an input that a Hessian could be made of, and a server's packed
linear, which has no weight, could not take its place: it stays dense. A forward without data on the meta
device shows it: every operation that gets the weight of a linear while that linear is not running.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TOKENS = 8


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its hook untyped
    """Notes the weights that reach an operation outside their linear's own forward."""

    def __init__(self, owners: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = owners
        self.running: set[str] = set()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            owner = self.owners.get(id(value)) if isinstance(value, Tensor) else None
            if owner is not None and owner not in self.running:
                self.found.add(owner)
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return False if first.dtype == torch.bool else 0
            if func is torch.ops.aten.nonzero.default:
                return first.new_empty((0, first.dim()), dtype=torch.long)
        return func(*args, **(kwargs or {}))


def read_not_called(model: nn.Module, linears: Iterable[str]) -> frozenset[str]:
    """Names of the `linears` of a meta model whose weight is used outside their forward.

    A model that cannot run without data shows what it did until it stopped.
    """
    owners = {id(model.get_submodule(name).weight): name for name in linears}
    watch = _Watch(owners)
    handles = []
    for name in owners.values():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: watch.running.add(name)))
        handles.append(
            module.register_forward_hook(lambda *_, name=name: watch.running.discard(name), always_call=True)
        )
    try:
        with torch.no_grad(), watch:
            ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
            model(input_ids=ids, use_cache=False)
    except Exception:  # noqa: BLE001 - whatever a forward without data raises: what was seen is what is known
        return frozenset(watch.found)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(watch.found)
