"""What the output of a linear is added to, and what happens to it before.

The last linear of an attention or an MLP does not put out what the next block reads: its output is added to
the residual stream, and that sum is read. In a model whose earlier blocks are quantized the residual has an
error of its own, part of which follows from the linear's input, so the linear can be asked to make up for
it: see `gptq.goal`. Which tensors are the residual is found by looking, not by a table of architectures.
While one sample runs through the block, every addition of two tensors as wide as the hidden states is noted.
A linear takes part in one if an operand is its output, as it is, scaled or normed: a `Gain` says what lies
between. The residual is everything else in the sum, and in the sums that go on from there, that is known
before the linear runs: what enters the block, the inputs and outputs of modules. In a block whose MLP runs
beside its attention that is the hidden states, and for the one that runs last the other one's output too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_cli.engine.calls import BlockCall
from gptq_cli.engine.stages import Stage
from gptq_cli.gptq.gain import Gain, find_gain

_ADDITIONS = ("aten.add.Tensor", "aten.add_.Tensor")


class Source(NamedTuple):
    """Where a tensor is seen while a block runs."""

    module: str
    """The module that has it; "" is the block itself."""
    output: bool = False
    """What the module put out, instead of its first input."""


BLOCK_INPUT = Source("")
"""The hidden states that enter the block."""


@dataclass(frozen=True, slots=True)
class Residual:
    """What the output of a linear is added to."""

    sources: tuple[Source, ...]
    """Their sum is the residual, as far as it is known before the linear runs."""
    gain: Gain | None = None
    """What happens to the output before; None: nothing."""

    def to(self, device: torch.device) -> Residual:
        """The same for a linear on `device`: another rank may have found it, on its own."""
        if self.gain is None:
            return self
        return replace(self, gain=replace(self.gain, gamma=self.gain.gamma.to(device)))


class _Sum(NamedTuple):
    """One addition, all values flattened."""

    place: int
    operands: tuple[Tensor, Tensor]
    total: Tensor


class _Additions(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its hook untyped
    """Notes additions of tensors with as many elements as the hidden states."""

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._elements = elements
        self.sums: list[_Sum] = []
        self.place = 0
        """Operations so far."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.place += 1
        a, b = (*args, None, None)[:2]
        noted = (
            str(func) in _ADDITIONS
            and isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.numel() == b.numel() == self._elements
        )
        if not noted:
            return func(*args, **kwargs)
        operands = (a.detach().flatten().clone(), (b * kwargs.get("alpha", 1)).detach().flatten())
        result = func(*args, **kwargs)
        self.sums.append(_Sum(self.place, operands, result.detach().flatten().clone()))
        return result


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was seen of a forward."""

    sums: list[_Sum]
    tensors: list[tuple[int, Source, Tensor]]
    """When, where and what, flattened."""

    def parts(self, value: Tensor, before: int, summed: float = math.inf) -> Iterator[Source]:
        """Where `value`, or the parts that it is the sum of, were seen before that place; others are left
        out. Only sums before the place `summed` are looked at: a part is older than its sum, though they may
        be equal, as where a value is infinite."""
        for place, source, tensor in self.tensors:
            if place < before and _equal(tensor, value):
                yield source
                return
        for one in self.sums:
            if one.place < summed and _equal(one.total, value):
                for operand in one.operands:
                    yield from self.parts(operand, before, one.place)
                return

    def residual(self, width: int, output: Tensor, place: int) -> Residual | None:
        """What `output`, flattened, which was there at `place`, is added to."""
        for index, one in enumerate(self.sums):
            for mine, other in (one.operands, one.operands[::-1]):
                same = _equal(mine, output)
                gain = None if same else find_gain(output.view(-1, width), mine.view(-1, width))
                if one.place > place and (same or gain is not None):
                    sources = [*self.parts(other, place), *self._beyond(index, place)]
                    return Residual(tuple(sources), gain) if sources else None
        return None

    def _beyond(self, index: int, before: int) -> Iterator[Source]:
        """What the sum `index` is added to in turn, and so on."""
        total = self.sums[index].total
        for later, one in enumerate(self.sums[index + 1 :], start=index + 1):
            for mine, other in (one.operands, one.operands[::-1]):
                if _equal(mine, total):
                    yield from self.parts(other, before)
                    yield from self._beyond(later, before)
                    return


def find_residuals(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    stages: Sequence[Stage],
    call: BlockCall,
    hidden: Tensor,  # (1, seq_len, hidden_size)
) -> dict[str, Residual]:
    """Linear -> what its output is added to.

    Only linears that run once and alone in their stage, whose residual is there, at least in part, before
    they run.
    """
    alone = {stage.leader for stage in stages if stage.once and len(stage.linears) == 1}
    wanted = {linears[name]: name for name in alone}
    routed = {
        Source(name, output) for s in stages if not s.once for name in s.linears for output in (False, True)
    }
    width = hidden.shape[-1]
    additions = _Additions(hidden.numel())
    tensors: list[tuple[int, Source, Tensor]] = [(0, BLOCK_INPUT, hidden.detach().flatten())]
    outputs: dict[str, tuple[int, Tensor]] = {}

    def note(source: Source, value: Any) -> None:
        if source in routed:  # of other samples it sees a part of the tokens
            return
        if isinstance(value, Tensor) and value.shape[-1:] == (width,) and value.numel() == hidden.numel():
            tensors.append((additions.place, source, value.detach().flatten().clone()))

    def before(name: str) -> Any:
        return lambda module, args: note(Source(name), args[0] if args else None)

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            note(Source(name, output=True), output)
            if module in wanted and isinstance(output, Tensor) and output.numel() == hidden.numel():
                outputs[wanted[module]] = (additions.place, output.detach().flatten().clone())

        return hook

    handles = []
    for name, module in block.named_modules():
        if name:
            handles.append(module.register_forward_hook(after(name)))
            if module not in wanted:
                handles.append(module.register_forward_pre_hook(before(name)))
    try:
        with torch.no_grad(), additions:
            call.rehearse(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    seen = _Seen(additions.sums, tensors)
    found = {name: seen.residual(width, output, place) for name, (place, output) in outputs.items()}
    return {name: residual for name, residual in found.items() if residual is not None}


def _equal(a: Tensor, b: Tensor) -> bool:
    wider = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wider), b.to(wider))
