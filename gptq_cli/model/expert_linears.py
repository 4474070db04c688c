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

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gptq_cli.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedTensor:
    """One 3-D parameter that holds a matrix per expert, and the linears that are made of it."""

    leaf: str
    """Its name in its module: `gate_up_proj`."""
    experts: int
    """E."""
    in_features: int
    """K of the matrix of an expert."""
    out_features: int
    """N of the matrix of an expert, of all its linears together."""
    transposed: bool
    """Stored (E, K, N), else (E, N, K)."""
    roles: tuple[str, ...]
    """The linears of an expert, in order: ("gate_proj", "up_proj"); "" for one without a name of its own."""
    interleaved: bool = False
    """Outputs of the linears alternate; else they follow one another."""
    bias: str | None = None
    """The (E, N) parameter whose row is added to the product, by the module's own forward."""

    def outputs(self, role: str) -> slice:
        """Which of the N outputs belong to the linear `role`."""
        place, parts = self.roles.index(role), len(self.roles)
        if self.interleaved:
            return slice(place, None, parts)
        size = self.out_features // parts
        return slice(place * size, (place + 1) * size)

    def linear(self, role: str, expert: int) -> str:
        """The linear's name inside its module: `7.gate_proj`."""
        return f"{expert}.{role}" if role else str(expert)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedExperts:
    """A module of the model whose matrices are computed expert by expert."""

    name: str
    """`model.layers.3.mlp.experts`."""
    tensors: tuple[FusedTensor, ...]

    def linears_of(self, tensor: FusedTensor) -> Iterator[str]:
        """The names in the model of the linears of one parameter, expert after expert."""
        for expert in range(tensor.experts):
            yield from (f"{self.name}.{tensor.linear(role, expert)}" for role in tensor.roles)

    def linears(self) -> Iterator[tuple[str, FusedTensor, str, int]]:
        """(name in the model, tensor, role, expert) of every linear, expert after expert."""
        for expert in range(max(tensor.experts for tensor in self.tensors)):
            for tensor in self.tensors:
                for role in tensor.roles if expert < tensor.experts else ():
                    yield f"{self.name}.{tensor.linear(role, expert)}", tensor, role, expert


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
        matrix = fused.detach()[self.expert]
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


class Unfused:
    """The mixin before the class of a module that `unfuse` has changed."""

    fused_tensors: tuple[FusedTensor, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, in which the linears compute the products."""
        assert isinstance(self, nn.Module)
        use_eager_forward(self)  # it may have been changed since: `model.set_experts_implementation`
        with ExpertCalls(self, self.fused_tensors, self._product):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _product(self, tensor: FusedTensor, expert: int, x: Tensor) -> Tensor:
        """x (…, K) -> (…, N) by the linears of one expert."""
        assert isinstance(self, nn.Module)
        found = [self.get_submodule(tensor.linear(role, expert))(x) for role in tensor.roles]
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
        kind: Any = type(module)
        module.__class__ = _unfused(kind)
        assert isinstance(module, Unfused)
        module.fused_tensors = info.tensors


def drop_parameters(module: nn.Module) -> None:
    """Free the fused parameters of an unfused module whose linears have been replaced.

    Its forward asks for their shapes, so tensors on the meta device, outside of the state dict, remain.
    Raises `ModelError` where some of the linears of a parameter have been replaced, and others not.
    """
    assert isinstance(module, Unfused)
    for tensor in module.fused_tensors:
        names = [tensor.linear(role, expert) for expert in range(tensor.experts) for role in tensor.roles]
        left = [name for name in names if isinstance(module.get_submodule(name), ExpertLinear)]
        if len(left) == len(names):
            continue
        if left:
            raise ModelError(f"{left[0]} is not quantized, though others of {tensor.leaf} are")
        parameter = module._parameters.pop(tensor.leaf)
        assert parameter is not None
        module.__dict__[tensor.leaf] = torch.empty_like(parameter, device="meta")


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


@dataclass(frozen=True, slots=True)
class _Matrices:
    """A tensor made of a fused parameter: all matrices, or that of one expert."""

    value: Tensor  # kept alive, so that no other tensor can get its id
    tensor: FusedTensor
    expert: int | None
    swapped: bool
    """Its last two dimensions are exchanged."""


Product = Callable[[FusedTensor, int, Tensor], Tensor]
"""(tensor, expert, x (…, K)) -> x times the expert's matrix (…, N)."""


class ExpertCalls(TorchFunctionMode):
    """While open: products with the fused parameters of `module` are computed by `product`.

    Raises `ModelError` naming the operation where a parameter is used in another way, and where it is used
    transposed to what its `FusedTensor` says. `noted` (leaf -> transposed), if given, takes the orientation
    of each parameter instead.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Iterable[FusedTensor],
        product: Product,
        noted: dict[str, bool] | None = None,
    ) -> None:
        super().__init__()
        self._module, self._product, self._noted = module, product, noted
        self._known: dict[int, _Matrices] = {}
        for tensor in tensors:
            self._keep(_Matrices(getattr(module, tensor.leaf), tensor, None, swapped=False))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function inside the `with`."""
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if not any(id(value) in self._known for value in given):
            return func(*args, **kwargs)
        if (
            func in _PRODUCTS
            and len(args) > 1
            and id(args[1]) in self._known
            and id(args[0]) not in self._known
        ):
            bias = (args[2] if len(args) > 2 else kwargs.get("bias")) if func is functional.linear else None
            y = self._multiply(args[0], self._known[id(args[1])], by_rows=func is functional.linear)
            return y if bias is None else y + bias
        held = self._known.get(id(args[0])) if args else None
        if held is not None and func is Tensor.__getitem__:
            return self._matrix(held, args[1])
        result = func(*args, **kwargs)
        if held is not None and (func in _TRANSPOSES or _exchanges(func, args[1:], kwargs, held.value.dim())):
            self._keep(_Matrices(result, held.tensor, held.expert, not held.swapped))
        elif isinstance(result, Tensor) and id(result) not in self._known:
            raise self._misused(func)
        return result

    def _keep(self, matrices: _Matrices) -> None:
        self._known[id(matrices.value)] = matrices

    def _matrix(self, held: _Matrices, index: Any) -> Tensor:
        """`parameter[expert]`."""
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
        if held.expert is not None or not single or isinstance(index, bool):
            raise self._misused(Tensor.__getitem__)
        expert = int(index)
        matrix = held.value[expert]
        self._keep(_Matrices(matrix, held.tensor, expert % held.tensor.experts, held.swapped))
        return matrix

    def _multiply(self, x: Tensor, matrices: _Matrices, *, by_rows: bool) -> Tensor:
        """`by_rows`: x Wᵀ, else x W."""
        tensor, transposed = matrices.tensor, by_rows == matrices.swapped
        if self._noted is not None:
            if self._noted.setdefault(tensor.leaf, transposed) != transposed:
                raise self._misused(functional.linear)
            columns = matrices.value.shape[-1 if by_rows else -2]
            rows = matrices.value.shape[-2 if by_rows else -1]
            tensor = replace(tensor, transposed=transposed, in_features=columns, out_features=rows)
        elif tensor.transposed != transposed:
            raise self._misused(functional.linear)
        if matrices.expert is not None:
            return self._routed(tensor, matrices.expert, x)
        if x.dim() != 3 or x.shape[0] != tensor.experts:
            raise self._misused(torch.bmm)
        result = x.new_zeros(*x.shape[:-1], tensor.out_features)
        for expert in range(tensor.experts):
            # tokens that are not routed to an expert are zeros
            routed = x[expert].any(-1)
            if bool(routed.all()):
                result[expert] = self._product(tensor, expert, x[expert])
            elif (given := routed.nonzero()[:, 0]).numel():
                result[expert, given] = self._product(tensor, expert, x[expert, given])
        return result

    def _routed(self, tensor: FusedTensor, expert: int, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], tensor.out_features)
        return self._product(tensor, expert, x)

    def _misused(self, func: Any) -> ModelError:
        return ModelError(
            f"{type(self._module).__name__} uses the parameters of its experts in "
            f"{getattr(func, '__name__', func)}; known: a product with the matrix of one expert, or of "
            "each with its own tokens"
        )


_PRODUCTS = frozenset(
    {
        functional.linear,
        torch.matmul,
        torch.mm,
        torch.bmm,
        Tensor.matmul,
        Tensor.mm,
        Tensor.bmm,
        Tensor.__matmul__,
    }
)
_TRANSPOSES = (Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]


def _exchanges(func: Any, places: tuple[Any, ...], kwargs: Mapping[str, Any], dimensions: int) -> bool:
    """Whether a call exchanges the last two dimensions of a tensor of so many."""
    if func not in (Tensor.transpose, torch.transpose) or len(places) != 2 or kwargs:
        return False
    return {place % dimensions for place in places} == {dimensions - 2, dimensions - 1}
