"""One forward of a model without data: what it shows before a weight is read.

A few tokens go through the model on the meta device. Shapes are computed but values are not, so a 70B model
is traced in a second, without memory. The trace shows

* in which order modules run, and which linears read the same tensor (they will be one stage);
* which linears did not run: those that only routed tokens reach, because nothing is routed here (experts);
* which linears only choose: routers of experts, indexers of sparse attention (`model.dataflow`);
* which linears are *read rather than called*: some architectures take the weight of a linear and multiply
  with it themselves (Mamba's `dt_proj`, absorbed latent attention). Such a linear never sees an input for a
  Hessian, and a reader's packed linear, which has no weight, could not replace it.

* how the hidden states go from block to block, see `model.flow`.

Where code asks for a value (is there padding, which expert does a token go to) it gets the simplest one:
zero, False, none. `ANSWERS` holds all of these, and replaces every operator that cannot run without data. A
model whose forward still fails has an incomplete trace, which says where it stopped and why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.model.blocks import shape
from gptq_cli.model.dataflow import DataFlow
from gptq_cli.model.flow import Flow, FlowWatch
from gptq_cli.model.gates import GATE_ROWS, GateFlow, small_gates
from gptq_cli.model.reads import Read
from gptq_cli.model.text_part import language_model
from gptq_cli.placement.names import owner

_TOKENS = 8
_FEW = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The result of one forward without data."""

    order: tuple[str, ...]
    """Modules in the order of their first call."""
    stages: tuple[tuple[str, ...], ...]
    """Linears of a block that read the same tensor, in the order of their first call."""
    idle: frozenset[str]
    """Linears that did not run. In a complete trace: routed ones (experts)."""
    read_not_called: frozenset[str]
    """Linears whose weight was used outside their own forward."""
    flow: Flow
    """How the hidden states go from block to block."""
    choosing: frozenset[str] = frozenset()
    """Modules whose weight only chooses: routers, indexers."""
    routed_share: float = 1.0
    """The part of the experts that a router picks for a token, on average; 1 where no top-k says it."""
    gating: frozenset[str] = frozenset()
    """Linears whose output only gates, see `model.gates`."""
    problem: str = ""
    """Where the forward stopped and why; "" when it completed. The other fields hold up to there."""

    @property
    def complete(self) -> bool:
        """True when the forward completed."""
        return not self.problem


def trace(model: Any, linears: Mapping[str, str], blocks: Sequence[str] = ()) -> Trace:
    """Run `model`, which is on the meta device, once. `linears`: name of each linear -> its block; `blocks`:
    those whose flow is followed. The model is left as it was.

    Errors of the model end up in `problem`; only an out-of-memory error is raised.
    """
    flow, data = FlowWatch(blocks, _TOKENS), DataFlow(dict(model.named_parameters(remove_duplicate=False)))
    watch = _Watch({name: model.get_submodule(name).weight for name in linears}, flow, data)
    inside = {model.get_submodule(name): name for name in blocks}
    names: dict[nn.Module, list[str]] = {}  # a shared module has several
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    rows = {name: shape(model.get_submodule(name))[0] for name in linears}
    gates = GateFlow(name for name, count in rows.items() if count < GATE_ROWS)
    order: dict[str, None] = {}
    reads: dict[str, Read] = {}
    handles = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        order.setdefault(names[module][0])
        watch.running.add(id(getattr(module, "weight", None)))
        if module in inside:
            flow.enter(inside[module], args, kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for name in names[module]:
            if name in linears and name not in reads and given:
                reads[name] = Read.of(given[0])

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        gates.follow(names[module][0], result)
        watch.running.discard(id(getattr(module, "weight", None)))
        if module in inside:
            flow.leave(inside[module], result)

    for module in names:
        if module is not model:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
    problem = ""
    try:
        with unchanged(model), torch.no_grad(), watch, gates if gates.names else nullcontext():
            ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
            language_model(model)(input_ids=ids, use_cache=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        problem = f"in {next(reversed(order), 'the model')}: {type(error).__name__}: {lines[0]}"
    finally:
        for handle in handles:
            handle.remove()
    stages = _stages(linears, reads)
    return Trace(
        order=tuple(order),
        stages=stages,
        idle=frozenset(linears.keys() - reads.keys()),
        read_not_called=frozenset(watch.found),
        flow=flow.flow(not problem),
        routed_share=data.share,
        choosing=frozenset(owner(name) for name in data.choosing(complete=not problem)),
        gating=small_gates(gates.gating, stages, rows),
        problem=problem,
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever a forward leaves on modules inside the `with` (frequencies computed for a length, states) is
    taken away afterwards: on the meta device it would be a tensor without values."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    contents = [
        (value, copy.copy(value))
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, dict | list | set)
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        for value, content in contents:
            if not _same_content(value, content):
                value.clear()
                if isinstance(value, list):
                    value.extend(content)
                else:
                    value.update(content)


def _same_content(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(key in value and value[key] is item for key, item in content.items())
    return all(a is b for a, b in zip(value, content, strict=True))


def _stages(linears: Mapping[str, str], reads: Mapping[str, Read]) -> tuple[tuple[str, ...], ...]:
    stages: list[list[str]] = []
    of_block: dict[str, list[list[str]]] = {}
    for name, read in reads.items():
        known = of_block.setdefault(linears[name], [])
        stage = next((stage for stage in known if reads[stage[0]].same(read)), None)
        if stage is None:
            stage = []
            known.append(stage)
            stages.append(stage)
        stage.append(name)
    return tuple(tuple(stage) for stage in stages)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its hook untyped
    """Notes the weights that reach an operation outside their linear's own forward, and answers `ANSWERS`."""

    def __init__(self, weights: Mapping[str, Tensor], flow: FlowWatch, data: DataFlow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flow, self._data = flow, data
        self._weights = weights  # kept alive, so that no other tensor can get one's id
        self._owners: dict[int, list[str]] = {}
        for name, weight in weights.items():
            self._owners.setdefault(id(weight), []).append(name)
        self.running: set[int] = set()
        """Ids of the weights of the modules that run now."""
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for tensor in tensors:
            if id(tensor) not in self.running:
                self.found.update(self._owners.get(id(tensor), ()))
        answer = ANSWERS.get(str(func))
        if answer is not None and any(tensor.is_meta for tensor in tensors):
            result = answer(func, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self._flow.ran(func, tensors, result)
        self._data.note(func, tensors, result)
        return result


def _scalar(func: Any, x: Tensor) -> bool | int | float | complex:
    return torch.zeros((), dtype=x.dtype).item()


def _nonzero(func: Any, x: Tensor) -> Tensor:
    return x.new_empty((0, x.dim()), dtype=torch.long)


def _selected(func: Any, x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty((0,))


def _indexed(func: Any, x: Tensor, indices: Any, *args: Any, **kwargs: Any) -> Any:
    """A mask as an index selects nothing: no indices for each of its dimensions."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            places += [index.new_empty((0,), dtype=torch.long)] * index.dim()
        else:
            places.append(index)
    return func(x, places, *args, **kwargs)


def _copied(func: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """A small tensor copied from the meta device to a real one becomes zeros; a large one stays on meta."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type == "meta" or x.numel() > _FEW:
        copy = func(x, **kwargs | {"device": "meta"})
        assert isinstance(copy, Tensor)
        return copy
    return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype, device=device)


def _equal(func: Any, *args: Any, **kwargs: Any) -> bool:
    return False


def _split(func: Any, x: Tensor, sizes: Any, dim: int = 0) -> Any:
    """Sizes read from a tensor are zeros here: the last piece gets the rest."""
    *before, last = sizes
    return func(x, [*before, max(last, x.shape[dim] - sum(before))], dim)


def _unique(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One unique value, which all elements have."""
    inverse = x.new_zeros(x.shape, dtype=torch.long)
    return x.new_empty((min(1, x.numel()),)), inverse, x.new_empty((min(1, x.numel()),), dtype=torch.long)


def _unique_of_dimension(func: Any, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Any:
    size = min(1, x.shape[dim])
    shape = [size if at == dim % x.dim() else length for at, length in enumerate(x.shape)]
    inverse = x.new_empty((x.shape[dim],), dtype=torch.long)
    return x.new_empty(shape), inverse, x.new_empty((size,), dtype=torch.long)


def _counted(func: Any, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    dtype = torch.long if weights is None else weights.dtype
    return x.new_empty((max(1, minlength),), dtype=dtype)


def _histogram(func: Any, x: Tensor, bins: int = 100, *args: Any, **kwargs: Any) -> Tensor:
    return x.new_empty((bins,))


def _repeated(func: Any, repeats: Tensor, *, output_size: int | None = None) -> Tensor:
    """Indices for `repeat_interleave`: each element once, unless `output_size` says how many there are."""
    size = repeats.numel() if output_size is None else output_size
    return repeats.new_empty((size,), dtype=torch.long)


def _grouped_mm(
    func: Any, a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """The shape of a grouped matmul; torch's own check requires bfloat16 and aligned sizes."""
    rows = (offs.numel() if offs is not None else 0,) if a.dim() == b.dim() == 2 else ()
    batch = (a.shape[0],) if a.dim() == b.dim() == 3 else ()
    return a.new_empty((*rows, *batch, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype)


def _grouped_mm_fallback(func: Any, a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[-1]))


def _nothing(func: Any, *args: Any, **kwargs: Any) -> None:
    return None


ANSWERS: Mapping[str, Callable[..., Any]] = {
    "aten._local_scalar_dense.default": _scalar,
    "aten.allclose.default": _equal,
    "aten.equal.default": _equal,
    "aten.is_nonzero.default": _equal,
    "aten.nonzero.default": _nonzero,
    "aten.masked_select.default": _selected,
    "aten.index.Tensor": _indexed,
    "aten.index_put.default": _indexed,
    "aten.index_put_.default": _indexed,
    "aten._to_copy.default": _copied,
    "aten.split_with_sizes.default": _split,
    "aten._unique2.default": _unique,
    "aten.unique_consecutive.default": _unique,
    "aten.unique_dim.default": _unique_of_dimension,
    "aten.bincount.default": _counted,
    "aten.histc.default": _histogram,
    "aten.repeat_interleave.Tensor": _repeated,
    "aten._grouped_mm.default": _grouped_mm,
    "transformers.grouped_mm_fallback.default": _grouped_mm_fallback,
    "aten._assert_async.default": _nothing,
    "aten._assert_async.msg": _nothing,
}
"""Operators that need values, also for the shape of their result -> what they return here."""
