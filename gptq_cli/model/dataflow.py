"""Which linears of a model only choose: found by following their outputs, not by their names.

A router picks the experts of a token, an indexer the tokens that are attended to. Both are small, a wrong
choice costs more than a wrong value, and readers of checkpoints expect them dense. What they have in common
is where their outputs go: into a top-k. While a model runs without data (`model.trace`), every operation is
noted here, and a value is known by the weights that it was multiplied with last:

* a matmul of a value with a weight ends what was known of the value, and begins with that weight;
* a matmul of two values, or a sum of values from different weights, is known by all of them;
* any other operation puts out what came in, but integers and truth values are choices and not values: the
  indices of a top-k (sort, argmax, …), the mask that a comparison makes.

A linear chooses if it is narrower than its input and its output reaches a top-k, or a softmax over all of its
outputs, without another value in between. It also chooses if everything that its output reaches is a top-k or
a linear that chooses: this finds linears that are combined before the top-k (an indexer's queries and keys)
and the first linears of a router of several. Attention that picks tokens by its own queries is not among
them, because these also reach the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

_MATMULS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "matmul", "linear", "dot")
) | {"aten::convolution", "aten::_grouped_mm", "transformers::grouped_mm_fallback"}
_PICKS = frozenset(
    f"aten::{name}" for name in ("topk", "sort", "argsort", "argmax", "argmin", "kthvalue", "multinomial")
)
_EXTREMES = frozenset({"aten::max", "aten::min"})
"""With `dim` they put out indices too; these pick only if something reads them."""
_SOFTMAXES = frozenset({"aten::_softmax", "aten::_log_softmax", "aten::softmax", "aten::_safe_softmax"})
_SHAPES_ONLY = ("_like", "::new_", "::size", "::stride")
_PICK = "top-k"


@dataclass(slots=True)
class _Known:
    """What is known of the values in one storage."""

    by: frozenset[str] = frozenset()
    """Weights that they were multiplied with last."""
    plain: bool = True
    """They come from one weight alone: not a product or a sum of several."""
    pending: frozenset[str] = frozenset()
    """Indices of a maximum that nothing has read yet."""
    weight: frozenset[str] = frozenset()
    """Not activations: made of these parameters alone."""


_NOTHING = _Known()


class DataFlow:
    """Follows values through one forward. A tensor is known by its storage, so that views and writes in place
    count."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._known: dict[int, _Known] = {}
        self._alive: list[Any] = []  # storages: no other one may get the address of one that is known
        self._reaches: dict[str, set[str]] = {}
        self._alone: set[str] = set()
        """Weights whose outputs reach a top-k by themselves."""
        self._shape: dict[str, tuple[int, int]] = {}  # N, K of a weight, as it was used
        self._shares: list[float] = []
        for name, tensor in parameters.items():
            known = self._of(tensor)
            self._set(tensor, _Known(weight=known.weight | {name}))

    def note(self, func: Any, given: Sequence[Tensor], result: Any) -> None:
        """The operation `func` was given these tensors and put out `result`."""
        schema = getattr(func, "_schema", None)  # an operator of higher order has none
        name = str(func if schema is None else schema.name)
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        known = [self._of(tensor) for tensor in given]
        if not outputs or any(part in name for part in _SHAPES_ONLY):
            return
        for one in known:
            if one.pending:
                self._pick(one.pending, plain=one.plain)
        weights = [one for one in known if one.weight]
        if known and len(weights) == len(known):
            made = frozenset[str]().union(*(one.weight for one in known))
            for tensor in outputs:
                self._put(tensor, _Known(weight=made))
            return
        by = frozenset[str]().union(*(one.by for one in known))
        sources = {one.by for one in known if one.by}
        plain = len(sources) <= 1 and all(one.plain for one in known)
        if name in _MATMULS or "attention" in name:
            if weights:
                self._multiplied(by, given, known, outputs)
                return
            plain = False
        if name in _PICKS:
            self._pick(by, plain=plain)
            if name == "aten::topk" and plain and len(by) == 1:
                self._picked(next(iter(by)), given[0].shape[-1], outputs[0].shape[-1])
        if name in _EXTREMES and len(outputs) == 2:
            self._put(outputs.pop(), _Known(plain=plain, pending=by))
        if name in _SOFTMAXES and plain and len(by) == 1:
            (only,) = by
            if any(tensor.shape[-1:] == self._shape[only][:1] for tensor in outputs):
                self._pick(by, plain=True)
        for tensor in outputs:
            if tensor.is_floating_point() or tensor.is_complex():
                self._put(tensor, _Known(by, plain))

    @property
    def share(self) -> float:
        """The part of its outputs that a router picks, on average over all routers; 1 where none was seen."""
        return sum(self._shares) / len(self._shares) if self._shares else 1.0

    def _picked(self, router: str, choices: int, picked: int) -> None:
        """A top-k picked from `choices`: those of all experts, or of groups of them."""
        rows, columns = self._shape[router]
        if choices == rows < columns:
            self._shares.append(picked / choices)

    def choosing(self, *, complete: bool) -> frozenset[str]:
        """The weights whose linears choose. `complete`: the forward came to its end, so that everything that
        an output reaches is known."""
        found = {name for name in self._alone if self._shape[name][0] < self._shape[name][1]}
        while complete:
            allowed = found | {_PICK}
            more = {name for name, reached in self._reaches.items() if reached and reached <= allowed} - found
            if not more:
                break
            found |= more
        return frozenset(found)

    def _multiplied(
        self, by: frozenset[str], given: Sequence[Tensor], known: Sequence[_Known], outputs: Iterable[Tensor]
    ) -> None:
        """A value was multiplied with a weight: from here on it is known by that."""
        matrices = [
            one.weight for one, tensor in zip(known, given, strict=True) if one.weight and tensor.dim() > 1
        ]
        names = frozenset[str]().union(*matrices)
        columns = max((t.shape[-1] for t, one in zip(given, known, strict=True) if not one.weight), default=0)
        for output in outputs:
            for name in names:
                self._shape[name] = (output.shape[-1] if output.dim() else 1, columns)
                self._reaches.setdefault(name, set())
            self._put(output, _Known(names))
        for name in by:
            self._reaches.setdefault(name, set()).update(names)

    def _pick(self, by: frozenset[str], *, plain: bool) -> None:
        for name in by:
            self._reaches.setdefault(name, set()).add(_PICK)
        if plain and len(by) == 1:
            self._alone |= by

    def _of(self, tensor: Tensor) -> _Known:
        return self._known.get(tensor.untyped_storage()._cdata, _NOTHING)

    def _put(self, tensor: Tensor, known: _Known) -> None:
        """What an operation put out: a new tensor, or one that was there, written to or seen as a view."""
        before = self._of(tensor)
        if before is _NOTHING:
            self._set(tensor, known)
        elif not before.weight:
            plain = before.plain and known.plain and len({by for by in (before.by, known.by) if by}) <= 1
            self._known[tensor.untyped_storage()._cdata] = _Known(before.by | known.by, plain)

    def _set(self, tensor: Tensor, known: _Known) -> None:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self._known[storage._cdata] = known
