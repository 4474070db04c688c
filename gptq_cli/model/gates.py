"""Linears whose output only gates: small ones whose output meets a sigmoid or its like before a product.

A gated delta network computes, beside its wide queries, keys and values, one number per head that says how
much is forgotten and one that says how much is written. The linears that make them are a thousandth of the
block and act on everything that it remembers; official releases leave them dense, and some readers have no
place for packed ones. They are found by what happens to their output in a forward without data: it reaches
a `sigmoid`, `softplus`, `exp` or `tanh` before any matmul, convolution or attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GATE_ROWS = 128
"""A gate has fewer output rows than this: one or two per head."""
GATE_RATIO = 8
"""The widest linear that reads the same input has so many times its rows, or more."""

_GATES = frozenset({"sigmoid", "sigmoid_", "softplus", "exp", "exp_", "tanh", "tanh_", "log_sigmoid_forward"})
_CONTRACTIONS = ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "convolution", "einsum")


class GateFlow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its hook untyped
    """Follows the outputs of linears inside a `with`; `gating` are those that went through a gate first."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = frozenset(names)
        """The linears that are followed."""
        self._open = set(self.names)
        self._carried: dict[int, tuple[Tensor, frozenset[str]]] = {}  # alive, so that ids stay theirs
        self.gating: set[str] = set()

    def follow(self, name: str, output: object) -> None:
        """`output` is what the linear `name` put out."""
        if name in self._open and isinstance(output, Tensor):
            self._carried[id(output)] = (output, frozenset({name}))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._carried:
            return result
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        names = frozenset().union(*(self._carried[id(x)][1] for x in inputs if id(x) in self._carried))
        names &= self._open
        if names:
            operator = str(func).split(".")[1]
            if operator in _GATES:
                self.gating |= names
                self._settle(names)
            elif operator in _CONTRACTIONS or "attention" in operator:
                self._settle(names)
            else:
                for made in tree_leaves(result):
                    if isinstance(made, Tensor):
                        self._carried[id(made)] = (made, names)
        return result

    def _settle(self, names: frozenset[str]) -> None:
        self._open -= names
        self._carried = {
            key: (tensor, held - names) for key, (tensor, held) in self._carried.items() if held - names
        }


def small_gates(
    gating: Iterable[str],
    stages: Iterable[tuple[str, ...]],
    rows: Mapping[str, int],  # N of each linear
) -> frozenset[str]:
    """Those of `gating` that are small beside the widest linear of their stage."""
    widest = {name: max(rows.get(other, 0) for other in stage) for stage in stages for name in stage}
    return frozenset(
        name for name in gating if rows[name] < GATE_ROWS and GATE_RATIO * rows[name] <= widest.get(name, 0)
    )
