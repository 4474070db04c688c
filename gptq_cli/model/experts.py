"""Experts that are fused into one parameter: found by structure, and proven on a tiny copy.

A candidate is a module inside the blocks that holds parameters of three dimensions itself, and is no
convolution; or one that is no linear, and whose parameters of two dimensions can be *stacks* (DBRX): it, or
the module above it, knows two numbers whose product is their rows. A tiny copy (few experts, narrow, random
weights, on the CPU) is run by its own forward, or by that of the module above,
three times: once as it is; once with its products with slices of the parameters watched, which shows how they
are stored; and once with the products computed by linears of single experts, biases included. Where the third
result equals the first, `expert_linears.unfuse` can serve the module. Where it does not, or the forward
cannot be run on its own, the parameters stay dense, and the reason is named.

Nothing here depends on the name of an architecture.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.model.expert_calls import ExpertCalls
from gptq_cli.model.expert_linears import use_eager_forward
from gptq_cli.model.fused import FusedExperts, FusedTensor, as_matrices

_TOKENS = 7
_TOP_K = 2
_MOST_ARGUMENTS = 3
"""The tokens, the experts of each, their weights."""
_LARGEST = 1 << 20
"""Elements of a parameter of a tiny copy."""
_GATED = ("gate_proj", "up_proj")
_WIDE = "gate_up_proj"

Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundExperts:
    """The modules with 3-D parameters in a model's blocks."""

    experts: tuple[FusedExperts, ...]
    """Those that are computed expert by expert."""
    dense: Mapping[str, str]
    """Parameter that stays dense -> why."""


def find_experts(model: nn.Module, blocks: Sequence[str]) -> FoundExperts:
    """Look at every module of the `blocks` of `model`, which is on the meta device.

    Modules of one class and shape are looked at once. An out-of-memory error is raised, other errors of the
    model's code are reasons.
    """
    known: dict[Any, _Found | str] = {}
    experts: list[FusedExperts] = []
    dense: dict[str, str] = {}
    seen: set[int] = set()
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules():
            held = stacked_parameters(module) or _possible_stacks(module)
            if not held or id(module) in seen:
                continue
            seen.add(id(module))
            full = f"{block}.{name}" if name else block
            above = full.rpartition(".")[0]
            parent = model.get_submodule(above)
            shapes = tuple((leaf, tuple(p.shape)) for leaf, p in module.named_parameters())
            key = (type(parent), type(module), shapes)
            if key not in known:
                known[key] = _examine(module, parent if name else None)
            found = known[key]
            if isinstance(found, _Found):
                user = above if found.by_parent else full
                experts.append(FusedExperts(name=full, tensors=found.tensors, user=user))
            elif stacked_parameters(module):
                dense |= {f"{full}.{leaf}": found for leaf in held}
    return FoundExperts(experts=tuple(experts), dense=dense)


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters of three dimensions that may be a stack of matrices."""
    if isinstance(module, _ConvNd):
        return {}
    own = module.named_parameters(recurse=False)
    return {leaf: p for leaf, p in own if p.ndim == 3 and min(p.shape[1:]) > 1}


def _possible_stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters of two dimensions, if all of them may be stacks of matrices."""
    if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return {}
    own = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.ndim == 2}
    return own if all(min(p.shape) > 1 for p in own.values()) else {}


def _numbers_of_experts(module: nn.Module, user: nn.Module) -> list[int]:
    """How many matrices the stacks of `module` can have: for 3-D parameters one number; for those of two
    dimensions every number that `user` or `module` knows, and that divides their rows into another one."""
    stacks = stacked_parameters(module)
    if stacks:
        return [min(p.shape[0] for p in stacks.values())]
    rows = {p.shape[0] for p in _possible_stacks(module).values()}
    known = {value for part in (module, user) for value in vars(part).values() if type(value) is int}
    found = {n for n in known if n > 1 and all(size % n == 0 and size // n in known for size in rows)}
    return sorted(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """How one module is served."""

    tensors: tuple[FusedTensor, ...]
    by_parent: bool
    """The module above multiplies with its parameters."""


def _examine(module: nn.Module, parent: nn.Module | None) -> _Found | str:
    """How the module stores its matrices; or why it stays dense."""
    first = ""
    for user in (module,) if parent is None else (module, parent):
        for experts in _numbers_of_experts(module, user):
            found = _examine_in(user, module, experts)
            if not isinstance(found, str):
                return _Found(tensors=found, by_parent=user is parent)
            first = first or found
    return first or f"{type(module).__name__} does not say how many matrices its parameters hold"


def _examine_in(user: nn.Module, module: nn.Module, experts: int) -> tuple[FusedTensor, ...] | str:
    """The same, by the forward of `user`, which is the module or holds it."""
    needed = [name for name, p in _parameters(user).items() if p.default is p.empty]
    if len(needed) > _MOST_ARGUMENTS:
        return f"{type(user).__name__} is not called as experts are: its forward takes {', '.join(needed)}"
    try:
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _Examination(user, module, experts).result()
    except Exception as error:  # whatever foreign code raises
        if is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{type(user).__name__} cannot be run on its own: {lines[0]}"


class _Examination:
    """The three runs of the tiny copy of `user`, whose forward multiplies with the parameters of `module`."""

    def __init__(self, user: nn.Module, module: nn.Module, experts: int) -> None:
        self.user, self.module, self.experts = user, module, experts
        self.together: set[str] = set()
        """Leaves with whose matrices the last run multiplied all at once."""
        stacks = stacked_parameters(module) or _possible_stacks(module)
        self.leaves = tuple(stacks)
        sizes = _small_sizes([_matrices_shape(p.shape, experts) for p in stacks.values()])
        self.few = sizes.get(experts, experts)
        copied = copy.deepcopy({"user": user, "module": module})
        self.tiny, self.holder = copied["user"].eval(), copied["module"]
        for leaf, parameter in stacks.items():
            shape = [sizes[size] for size in _matrices_shape(parameter.shape, experts)]
            values = torch.randn(shape if parameter.ndim == 3 else (shape[0] * shape[1], shape[2]))
            self.holder._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        _shrink(self.tiny, sizes, {id(self.holder._parameters[leaf]) for leaf in self.leaves})

    def result(self) -> tuple[FusedTensor, ...] | str:
        kind = type(self.user).__name__
        refusals: list[str] = []
        for arguments in self._arguments():
            try:
                expected = self.tiny(*arguments)
                noted = self._watched(arguments)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                refusals.append((str(error).strip().splitlines() or [type(error).__name__])[0])
                continue
            if set(noted) != set(self.leaves) or not isinstance(expected, Tensor):
                refusals.append(f"{kind} multiplies with no slices of its parameters")
                continue
            tensors = tuple(self._described(self.holder, leaf, self.few, noted[leaf]) for leaf in self.leaves)
            if not self._equal(arguments, expected, tensors):
                return f"{kind} computes something else than its experts one by one"
            tensors = self._with_roles(arguments, tensors)
            real = {t.leaf: self._described(self.module, t.leaf, self.experts, t.transposed) for t in tensors}
            return tuple(
                replace(
                    real[t.leaf],
                    roles=t.roles,
                    interleaved=t.interleaved,
                    bias=t.bias,
                    together=t.leaf in self.together,
                )
                for t in tensors
            )
        known = [text for text in refusals if text.startswith(kind)]
        return (known or [f"{kind} cannot be run on its own: {refusals[-1]}" if refusals else "no forward"])[
            0
        ]

    def _arguments(self) -> Iterator[Arguments]:
        """What a module of experts may be called with.

        These are (tokens, experts of each, their weights), tokens sorted by expert with the number of each
        expert's, tokens with their weight for every expert, or a copy of the tokens for every expert.
        """
        count = len(_parameters(self.tiny))
        parameters = [getattr(self.holder, leaf) for leaf in self.leaves]
        shapes = [_matrices_shape(p.shape, self.few) for p in parameters]
        experts = self.few
        for width in dict.fromkeys(size for shape in shapes for size in shape[1:]):
            x = torch.randn(_TOKENS, width)
            if count >= 3:
                index = torch.stack([torch.randperm(experts)[:_TOP_K] for _ in range(_TOKENS)])
                yield (x, index, torch.rand(index.shape) + 0.1)
            elif count == 2:
                sizes = [1 + (expert < _TOKENS % experts) for expert in range(experts)]
                yield (torch.randn(sum(sizes), width), sizes)
                yield (torch.randn(1, _TOKENS, width), torch.rand(_TOKENS, experts) + 0.1)
            else:
                yield (torch.randn(experts * _TOKENS, width),)
                yield (torch.randn(1, _TOKENS, width),)

    def _watched(self, arguments: Arguments) -> dict[str, bool]:
        """Leaf -> whether its matrices are stored transposed, as the forward uses them."""
        noted: dict[str, bool] = {}
        unknown = tuple(self._described(self.holder, leaf, self.few, False) for leaf in self.leaves)
        self._run(arguments, unknown, _plain(self.holder), noted)
        return noted

    def _run(
        self,
        arguments: Arguments,
        tensors: Sequence[FusedTensor],
        product: Callable[[FusedTensor, int, Tensor], Tensor],
        noted: dict[str, bool] | None = None,
    ) -> Any:
        with ExpertCalls(self.holder, tensors, product, noted) as calls:
            result = self.tiny(*arguments)
        self.together = calls.together
        return result

    def _described(self, module: nn.Module, leaf: str, experts: int, transposed: bool) -> FusedTensor:
        _, *matrix = _matrices_shape(getattr(module, leaf).shape, experts)
        columns, rows = matrix if transposed else reversed(matrix)
        own = dict(module.named_parameters(recurse=False))
        biases = [
            name
            for name, p in own.items()
            if name != leaf and name.startswith(leaf) and tuple(p.shape) == (experts, rows)
        ]
        return FusedTensor(
            leaf=leaf,
            experts=experts,
            in_features=columns,
            out_features=rows,
            transposed=transposed,
            roles=("" if leaf == "weight" else leaf.removesuffix("_weight"),),
            bias=biases[0] if len(biases) == 1 else None,
        )

    def _equal(self, arguments: Arguments, expected: Tensor, tensors: Sequence[FusedTensor]) -> bool:
        """Whether linears, with the biases in them and none in the module, give the `expected` result."""
        kept = {t.bias: getattr(self.holder, t.bias).clone() for t in tensors if t.bias}

        def product(tensor: FusedTensor, expert: int, x: Tensor) -> Tensor:
            y = _plain(self.holder)(tensor, expert, x)
            return y + kept[tensor.bias][expert] if tensor.bias else y

        for name in kept:
            getattr(self.holder, name).zero_()
        try:
            found = self._run(arguments, tensors, product)
        finally:
            for name, value in kept.items():
                getattr(self.holder, name).copy_(value)
        return (
            isinstance(found, Tensor)
            and bool(torch.isfinite(expected).all())
            and bool(expected.any())
            and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        )

    def _with_roles(self, arguments: Arguments, tensors: tuple[FusedTensor, ...]) -> tuple[FusedTensor, ...]:
        """Divide the matrix that feeds the gate and what is gated into the two.

        Its outputs are twice as many as the inputs of another matrix. One of them is changed: which of those
        inputs changes with it shows whether the halves follow one another or alternate.
        """
        for wide in tensors:
            narrow = [t for t in tensors if 2 * t.in_features == wide.out_features and t is not wide]
            if len(narrow) != 1:
                continue
            before, after = (self._inner(arguments, tensors, wide, narrow[0], by) for by in (0.0, 0.5))
            differ = [(x != y).nonzero()[:, -1] for x, y in zip(before, after, strict=True)]
            changed = {place for places in differ for place in places.tolist()}
            if changed in ({0}, {1}):
                parted = replace(wide, roles=_GATED, interleaved=changed == {0})
                return tuple(parted if t is wide else t for t in tensors)
        return tensors

    def _inner(
        self,
        arguments: Arguments,
        tensors: Sequence[FusedTensor],
        wide: FusedTensor,
        narrow: FusedTensor,
        change: float,
    ) -> list[Tensor]:
        """The inputs of `narrow` after `change` was added to output 1 of `wide`."""
        caught: list[Tensor] = []

        def product(tensor: FusedTensor, expert: int, x: Tensor) -> Tensor:
            y = _plain(self.holder)(tensor, expert, x)
            if tensor.leaf == narrow.leaf:
                caught.append(x.clone())
            elif tensor.leaf == wide.leaf:
                y[..., 1] += change
            return y

        self._run(arguments, tensors, product)
        return caught


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """What the module's forward takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = inspect.signature(type(module).forward).parameters
    return {name: p for name, p in list(taken.items())[1:] if p.kind in kinds}


def _plain(module: nn.Module) -> Callable[[FusedTensor, int, Tensor], Tensor]:
    """The product with a matrix of the parameter itself."""

    def product(tensor: FusedTensor, expert: int, x: Tensor) -> Tensor:
        matrix = as_matrices(getattr(module, tensor.leaf), tensor.experts)[expert]
        return x @ (matrix if tensor.transposed else matrix.t())

    return product


def _matrices_shape(shape: Sequence[int], experts: int) -> tuple[int, ...]:
    """(E, rows, columns) of a parameter of three dimensions, or of two."""
    return tuple(shape) if len(shape) == 3 else (experts, shape[0] // experts, shape[1])


def _small_sizes(shapes: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """Real size -> small one. What is twice another stays so, and what is one."""
    small: dict[int, int] = {1: 1}
    fresh = iter(range(5, 1000, 2))
    first = iter(range(4, 1000, 7))
    for size in sorted({shape[0] for shape in shapes} - set(small)):
        small[size] = next(first)
    for size in sorted({size for shape in shapes for size in shape[1:]} - set(small)):
        small[size] = 2 * small[size // 2] if size % 2 == 0 and size // 2 in small else next(fresh)
    return small


def _shrink(tiny: nn.Module, sizes: Mapping[int, int], done: Set[int]) -> None:
    """Give the module random parameters on the CPU, in which every size is the small one; but for those with
    the ids `done`."""
    for part in tiny.modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            shape = [sizes.get(size, size) for size in parameter.shape]
            if torch.Size(shape).numel() > _LARGEST and id(parameter) not in done:
                raise ValueError(f"its parameter {leaf} has sizes that its experts do not have")
            if id(parameter) not in done:
                part._parameters[leaf] = nn.Parameter(torch.randn(shape), requires_grad=False)
        for leaf, buffer in part.named_buffers(recurse=False):
            part._buffers[leaf] = torch.ones([sizes.get(size, size) for size in buffer.shape])
        for name, value in vars(part).items():
            if type(value) is int and value in sizes:
                part.__dict__[name] = sizes[value]
        use_eager_forward(part)
