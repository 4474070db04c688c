"""How parameters hold the matrices of many experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedTensor:
    """One parameter that holds a matrix per expert, and the linears that are made of it.

    Most have three dimensions; a *stack* has two, its matrices follow one another along the rows.
    """

    leaf: str
    """Its name in its module: `gate_up_proj`."""
    experts: int
    """E."""
    in_features: int
    """K of the matrix of an expert."""
    out_features: int
    """N of the matrix of an expert, of all its linears together."""
    transposed: bool
    """Stored (E, K, N), else (E, N, K); a stack: (E · K, N), else (E · N, K)."""
    roles: tuple[str, ...]
    """The linears of an expert, in order: ("gate_proj", "up_proj"); "" for one without a name of its own."""
    interleaved: bool = False
    """Outputs of the linears alternate; else they follow one another."""
    bias: str | None = None
    """The (E, N) parameter whose row is added to the product, by the module's own forward."""
    together: bool = False
    """All experts are multiplied at once, each with as many rows as there are tokens."""

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
    """The one that holds the parameters: `model.layers.3.mlp.experts`."""
    tensors: tuple[FusedTensor, ...]
    user: str
    """The one whose forward multiplies with them: the same, or the module that holds it."""

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


def as_matrices(parameter: Tensor, experts: int) -> Tensor:  # (E, rows, columns)
    """A view of the parameter of so many experts in which each has its matrix."""
    return parameter if parameter.dim() == 3 else parameter.view(experts, -1, parameter.shape[1])
