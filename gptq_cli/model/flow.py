"""How the hidden states go from block to block, as one forward without data shows it.

The engine works on one block at a time, over all samples. In most models that needs nothing from the model's
own code but the arguments of each block: what a block returns is what the next one is given, and no other
argument depends on a block. Such a flow is *direct*. In others it is not: blocks return several tensors of
which the next one takes two, keys and values of one layer are read by a later one, a residual is mixed in
between. There the model's own forward has to run between the blocks, see `engine.driven`.

The flow is found by following storages through the operators of one forward on the meta device: what a block
makes, and what is made of it, *depends on* that block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Carrier = int | str
"""Where a block's hidden states are among its arguments: a position, or a keyword."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """How the model calls one block."""

    carrier: Carrier
    results: int | None
    """How many values the block returns in a tuple, of which the first is the hidden states; None where it
    returns the hidden states alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """The result of following one forward."""

    blocks: tuple[str, ...] = ()
    """Those that the forward called, as they stand in the model."""
    called: tuple[str, ...] = ()
    """Blocks in the order of their calls, up to the call of the last one that had not been called. Where they
    are called again after that (a recurrence over the whole stack), they are worked on once, with what they
    are given first."""
    shapes: Mapping[str, BlockShape]
    between: str = ""
    """Why the model's own code has to run between the blocks; "" where the flow is direct."""
    hidden_channel: str = ""
    """Which block reads what another one left behind outside its result and its arguments."""
    written: frozenset[str] = frozenset()
    """Blocks that write into their arguments."""

    @property
    def direct(self) -> bool:
        """True where the output of each block is the input of the next, and no other argument depends on a
        block."""
        return not self.between and not self.obstacle

    @property
    def obstacle(self) -> str:
        """Why the blocks cannot be worked on one after another; "" where they can."""
        for name in self.blocks:
            times = self.called.count(name)
            if times != 1:
                return f"{name} is called {times} times before the last block is called"
        for before, after in zip(self.called, self.called[1:], strict=False):
            if self.blocks.index(after) < self.blocks.index(before):
                return f"{after} is called after {before}"
        return self.hidden_channel


class FlowWatch:
    """Follows the tensors of one forward. Storages are kept, so that no other can get one's address; on the
    meta device they take no memory."""

    def __init__(self, blocks: Sequence[str], tokens: int) -> None:
        self._blocks, self._tokens = tuple(blocks), tokens
        self._made_by: dict[int, str] = {}  # storage -> the block that it depends on
        self._made: dict[int, Any] = {}  # storages that the forward made; a reference each
        self._calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._carriers: dict[str, Carrier] = {}
        self._results: dict[str, Any] = {}
        self._running: str | None = None
        self._given: frozenset[int] = frozenset()
        self._mixed = ""  # an operator outside the blocks that read what a block made
        self._between: list[tuple[int, str]] = []  # at which call, and why
        self._channel: list[tuple[int, str]] = []
        self._place = 0  # number of the call that runs, or ran last
        self._written: set[str] = set()
        self._previous: Any = None

    def enter(self, block: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """`block` is called."""
        if self._running is not None:
            return  # a block inside a block
        self._place = len(self._calls)
        if self._calls and self._mixed:
            self._note(f"{self._mixed} runs on the output of {self._calls[-1][0]} before {block} is called")
        self._mixed = ""
        given = list(tensors_in((args, dict(kwargs))))
        self._given = frozenset(map(_storage, given))
        for place, value in _places(args, kwargs):
            if value is hidden_in(self._previous) and isinstance(value, Tensor):
                self._carriers[block] = place
        if self._calls:
            last, carried = self._calls[-1][0], hidden_in(self._previous)
            dependent = [tensor for tensor in given if _storage(tensor) in self._made_by]
            if not any(tensor is carried for tensor in dependent):
                self._note(f"{block} is not given what {last} returned")
            elif len(dependent) > 1:
                maker = self._made_by[_storage(dependent[-1])]
                self._note(f"{block} is given more than one tensor that depends on {maker}")
            elif block not in self._carriers:
                self._note(f"{block} is given what {last} returned inside another argument")
        self._calls.append((block, args, dict(kwargs)))
        self._running = block

    def leave(self, block: str, result: Any) -> None:
        """`block` returned."""
        if self._running != block:
            return
        self._running = None
        self._results[block] = self._previous = result
        _, args, kwargs = self._calls[-1]
        if block not in self._carriers:
            self._carriers[block] = find_carrier(args, kwargs, hidden_in(result))
        for tensor in tensors_in(result):
            self._depends(tensor, block)
        hidden, entered = hidden_in(result), argument(args, kwargs, self._carriers[block])
        shape = entered.shape if isinstance(entered, Tensor) else None
        if hidden is None or not _plain(result):
            self._note(f"{block} returns a {type(result).__name__} of another form than (hidden states, …)")
        elif hidden.shape != shape or hidden.shape[:-1] != (1, self._tokens):
            self._note(f"the hidden states of {block} are not of the form (batch, tokens, features)")

    def ran(self, func: Any, read: Sequence[Tensor], result: Any) -> None:
        """An operator ran: `read` are its tensors."""
        makers = [
            (tensor, self._made_by[_storage(tensor)]) for tensor in read if _storage(tensor) in self._made_by
        ]
        known = set(map(_storage, read))
        written = {_storage(read[0])} if func._schema.is_mutable and read else set()
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        new = [value for value in made if _storage(value) not in known - written]
        block = self._running
        if block is None:
            if makers:
                self._mixed = self._mixed or str(func).removeprefix("aten.").partition(".")[0]
                for tensor in new:
                    self._depends(tensor, makers[0][1])
            return
        if written & self._given:
            self._written.add(block)
        for tensor, maker in makers:
            if maker != block and _storage(tensor) not in self._given:
                why = f"{block} reads a tensor of {maker} that it is not given in its arguments"
                self._channel.append((self._place, why))
        for tensor in new:
            self._depends(tensor, block)

    def flow(self, complete: bool) -> Flow:
        """What was seen. Without a `complete` forward nothing is known: the model's own code has to run."""
        shapes = {
            block: BlockShape(carrier=self._carriers[block], results=_results(self._results[block]))
            for block in self._results
        }
        if not complete:
            return Flow(
                blocks=self._blocks,
                called=self._blocks,
                shapes=shapes,
                between="the forward without data did not reach its end",
            )
        names = [block for block, _, _ in self._calls]
        last = max((names.index(block) for block in set(names)), default=-1)  # the last that is new
        return Flow(
            blocks=tuple(block for block in self._blocks if block in names),
            called=tuple(names[: last + 1]),
            shapes=shapes,
            between=next((why for place, why in self._between if place <= last), ""),
            hidden_channel=next((why for place, why in self._channel if place <= last), ""),
            written=frozenset(self._written),
        )

    def _note(self, why: str) -> None:
        self._between.append((self._place, why))

    def _depends(self, tensor: Tensor, block: str) -> None:
        storage = tensor.untyped_storage()
        self._made_by.setdefault(storage._cdata, block)
        self._made[storage._cdata] = storage


def find_carrier(args: tuple[Any, ...], kwargs: Mapping[str, Any], like: Tensor | None = None) -> Carrier:
    """Where the hidden states are: the first tensor of floating point that has the shape of `like`, else the
    first one; positional arguments come first."""
    floats = [
        (place, value)
        for place, value in _places(args, kwargs)
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    alike = [place for place, value in floats if like is not None and value.shape == like.shape]
    return next(iter((*alike, *(place for place, _ in floats))), 0)


def _places(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Carrier, Any]]:
    return [*enumerate(args), *kwargs.items()]


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: Carrier) -> Any:
    """The argument at `place`; None where there is none."""
    if isinstance(place, int):
        return args[place] if place < len(args) else None
    return kwargs.get(place)


def hidden_in(result: Any) -> Tensor | None:
    """The hidden states in what a block returned: the tensor itself, or the first of a tuple or a list."""
    first = result[0] if isinstance(result, tuple | list) and result else result
    return first if isinstance(first, Tensor) else None


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in `value`, also inside containers and inside the attributes of objects (caches)."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, str | bytes | int | float | complex | type | nn.Module) or value is None:
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, tuple | list | set | frozenset):
        for item in value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from tensors_in(vars(value), seen)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _results(result: Any) -> int | None:
    return len(result) if isinstance(result, tuple | list) else None


def _plain(result: Any) -> bool:
    return isinstance(result, Tensor) or type(result) in (tuple, list)
