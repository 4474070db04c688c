"""The matrices of fused experts as linears of their own, called from the model's own forward.

Transformers 5 keeps all experts of a layer in 3-D parameters, say `gate_up_proj` (E, 2 I, H) and `down_proj`
(E, H, I), and its forward multiplies with one slice after another. `unfuse` gives such a module one linear
per expert and matrix, `experts.7.gate_proj`, whose weight is a *view* of the parameter: nothing is copied,
what is assigned to the linear is written to the parameter, and wherever the parameter moves (to the meta
device and back, to another device), the view follows, because it is made anew each time it is asked for.

The forward stays the model's own, with its routing, activation, clamps, norms and biases. While it runs,
`ExpertCalls` watches for the products that it computes with the 3-D parameters, and lets the linears compute
them. So the linears are called like all others: hooks see their inputs, and packed linears may stand in
their places. Anything else that is done with a parameter of experts is an error; `model.experts` finds out
beforehand for which modules this works.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.errors import ModelError
from gptq_cli.model.expert_calls import ExpertCalls
from gptq_cli.model.fused import FusedExperts, FusedTensor, as_matrices


class ExpertLinear(nn.Linear):
    """One linear of one expert, without a bias; `weight` is a view of the fused parameter."""

    def __init__(self, owner: nn.Module, tensor: FusedTensor, role: str, expert: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight
        self.in_features = tensor.in_features
        self.out_features = tensor.out_features // len(tensor.roles)
        self._owner = (owner,)  # a tuple: the owner is no part of this module
        self.tensor, self.role, self.expert = tensor, role, expert
        self._is_hf_initialized = True  # Transformers has nothing to fill in here

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # (N, K)
        """The expert's matrix, or its part of it."""
        fused = self.owner._parameters[self.tensor.leaf]
        assert fused is not None
        matrix = as_matrices(fused.detach(), self.tensor.experts)[self.expert]
        return (matrix.t() if self.tensor.transposed else matrix)[self.tensor.outputs(self.role)]

    @property
    def bias(self) -> None:  # type: ignore[override]
        """None: the module's own forward adds it."""
        return

    @property
    def owner(self) -> nn.Module:
        """The module of the experts."""
        return self._owner[0]


def is_interleaved(linear: nn.Module) -> bool:
    """Whether its rows alternate with those of another linear in a tensor of fused experts."""
    return isinstance(linear, ExpertLinear) and linear.tensor.interleaved


def is_together(linear: nn.Module) -> bool:
    """Whether it is multiplied at once with the linears of all experts."""
    return isinstance(linear, ExpertLinear) and linear.tensor.together


class Unfused:
    """The mixin before the class of a module that `unfuse` has changed."""

    experts_at: str
    """Where the module with the parameters is in this one; "" for this one itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, in which the linears compute the products."""
        assert isinstance(self, nn.Module)
        use_eager_forward(self)  # it may have been changed since: `model.set_experts_implementation`
        holder = self.get_submodule(self.experts_at)
        with ExpertCalls(holder, _fused_tensors(holder), self._product):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _product(self, tensor: FusedTensor, expert: int, x: Tensor) -> Tensor:
        """x (…, K) -> (…, N) by the linears of one expert."""
        assert isinstance(self, nn.Module)
        holder = self.get_submodule(self.experts_at)
        found = [holder.get_submodule(tensor.linear(role, expert))(x) for role in tensor.roles]
        if len(found) == 1:
            return found[0]  # type: ignore[no-any-return]
        return torch.stack(found, -1).flatten(-2) if tensor.interleaved else torch.cat(found, -1)


def unfuse(model: nn.Module, experts: Iterable[FusedExperts]) -> None:
    """Give the modules `experts` of `model` their linears, in place. Parameters and state dict stay."""
    for info in experts:
        module = model.get_submodule(info.name)
        use_eager_forward(module)
        for _, tensor, role, expert in info.linears():
            parent: nn.Module = module
            if role:
                if str(expert) not in module._modules:
                    module.add_module(str(expert), nn.Module())
                parent = module.get_submodule(str(expert))
            parent.add_module(role or str(expert), ExpertLinear(module, tensor, role, expert))
        module.__dict__[_TENSORS] = info.tensors
        user = model.get_submodule(info.user)
        kind: Any = type(user)
        user.__class__ = _unfused(kind)
        assert isinstance(user, Unfused)
        user.experts_at = info.name.removeprefix(info.user).removeprefix(".")


def drop_parameters(module: nn.Module) -> None:
    """Free the fused parameters of an unfused module whose linears have been replaced.

    Its forward asks for their shapes, so tensors on the meta device, outside of the state dict, remain.
    Raises `ModelError` where some of the linears of a parameter have been replaced, and others not.
    """
    for tensor in _fused_tensors(module):
        names = [tensor.linear(role, expert) for expert in range(tensor.experts) for role in tensor.roles]
        left = [name for name in names if isinstance(module.get_submodule(name), ExpertLinear)]
        if len(left) == len(names):
            continue
        if left:
            raise ModelError(f"{left[0]} is not quantized, though others of {tensor.leaf} are")
        parameter = module._parameters.pop(tensor.leaf)
        assert parameter is not None
        module.__dict__[tensor.leaf] = torch.empty_like(parameter, device="meta")


def hollow(model: nn.Module, names: Iterable[str]) -> None:
    """Put linears with their weights on the meta device in the places of those of `names` that are linears of
    fused experts, and free the parameters of these, in place.

    A forward can then be given the weights, like those of all other linears (`torch.func.functional_call`).
    Raises `ModelError` where only some of a parameter's linears are named.
    """
    owners: dict[nn.Module, None] = {}
    for name in names:
        linear = model.get_submodule(name)
        if isinstance(linear, ExpertLinear):
            owners[linear.owner] = None
            size, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
            empty = nn.Linear(*size, bias=False, device="meta", dtype=dtype)
            model.set_submodule(name, empty.requires_grad_(False).eval())
    for owner in owners:
        drop_parameters(owner)


_TENSORS = "fused_tensors"
"""The attribute of an unfused module that has its `FusedTensor`s."""


def _fused_tensors(module: nn.Module) -> tuple[FusedTensor, ...]:
    found: tuple[FusedTensor, ...] = module.__dict__[_TENSORS]
    return found


def use_eager_forward(module: nn.Module) -> None:
    """Have Transformers call the forward that is written in the module's class: other implementations of
    experts multiply with all of them at once."""
    config: Any = module.__dict__.get("config")
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"


@cache
def _unfused(kind: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (Unfused, kind), names)
