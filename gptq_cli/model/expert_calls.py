"""Watching a forward for its products with the matrices of fused experts.

The forward of a module of experts takes the matrix of one expert after another out of its parameters, by an
index, a slice, a view or a chunk, and multiplies with it; or it multiplies a copy of the tokens for every
expert with all matrices at once. `ExpertCalls` recognizes these products and has others compute them: linears
in their places (`expert_linears`), or a probe that finds out what the forward does (`experts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gptq_cli.errors import ModelError
from gptq_cli.model.fused import FusedTensor


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
        self.together: set[str] = set()
        """The parameters of which all matrices were multiplied with at once."""
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
        if held is not None and held.expert is None and self._parted(held, func, result):
            return result
        if held is not None and (func in _TRANSPOSES or _exchanges(func, args[1:], kwargs, held.value.dim())):
            self._keep(_Matrices(result, held.tensor, held.expert, not held.swapped))
        elif isinstance(result, Tensor) and id(result) not in self._known:
            raise self._misused(func)
        return result

    def _keep(self, matrices: _Matrices) -> None:
        self._known[id(matrices.value)] = matrices

    def _parted(self, held: _Matrices, func: Any, result: Any) -> bool:
        """Whether `func` made the matrices of all experts: a stack seen as three dimensions, or one tensor
        for each."""
        experts = held.tensor.experts
        rows, columns = held.value.shape[-2:]
        if held.value.dim() == 2 and not held.swapped:
            if func in _VIEWS and result.shape == (experts, rows // experts, columns):
                self._keep(replace(held, value=result))
                return True
            rows //= experts
        elif func is not Tensor.unbind and func is not torch.unbind:
            return False
        parts = result if isinstance(result, tuple | list) else ()
        if len(parts) != experts or any(part.shape != (rows, columns) for part in parts):
            return False
        for expert, part in enumerate(parts):
            self._keep(replace(held, value=part, expert=expert))
        return True

    def _rows(self, held: _Matrices, index: slice) -> Tensor:
        """`stack[first row of an expert : first row of the next]`."""
        start, stop, step = index.indices(len(held.value))
        size = len(held.value) // held.tensor.experts
        if step != 1 or start % size or stop - start != size:
            raise self._misused(Tensor.__getitem__)
        matrix = held.value[index]
        self._keep(replace(held, value=matrix, expert=start // size))
        return matrix

    def _matrix(self, held: _Matrices, index: Any) -> Tensor:
        """`parameter[expert]`."""
        if isinstance(index, slice) and held.value.dim() == 2 and held.expert is None and not held.swapped:
            return self._rows(held, index)
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
        if held.value.dim() != 3 or held.expert is not None or not single or isinstance(index, bool):
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
        if x.dim() != 3 or matrices.value.dim() != 3 or x.shape[0] != tensor.experts:
            raise self._misused(torch.bmm)
        self.together.add(tensor.leaf)
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
_VIEWS = frozenset({Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten})
_TRANSPOSES = (Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]


def _exchanges(func: Any, places: tuple[Any, ...], kwargs: Mapping[str, Any], dimensions: int) -> bool:
    """Whether a call exchanges the last two dimensions of a tensor of so many."""
    if func not in (Tensor.transpose, torch.transpose) or len(places) != 2 or kwargs:
        return False
    return {place % dimensions for place in places} == {dimensions - 2, dimensions - 1}
