"""Bringing every micro-batch of calibration data to a stage of a block.

GPTQ with true-sequential stages must see the input of a stage *after* the earlier stages of the same
block were quantized. Two ways lead there; both give the same inputs to the last bit.

**Replayed** (the classic way): for each stage run the block's forward on each micro-batch from its
start and stop it where the stage begins; after the last stage run it once more to the end. The cost
is the sum of all those prefixes: about three forwards for a Llama block. Only the block's inputs are held.

**Parked**: each micro-batch's forward runs in a thread of its own and is parked by a pre-hook at the
first linear of each stage. When all of them are parked there, the engine quantizes the stage, and
the forwards go on with the new weights. Every linear runs once per token. Exactly one thread runs at
any time: the others wait on a semaphore, so this is a coroutine, not concurrency. What it costs is
the memory of the parked frames: for a Llama block the normed input and the residual at attention,
and the residual and the MLP's inner activation at the down projection.

    with ParkedForwards(block, linears, stages, calls, hidden) as run:
        for stage in stages:
            for _, x in run.inputs([stage]): ...  # x (batch, seq_len, K)
            quantize the stage's linears in place
        outputs = run.finish()
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from gptq_cli.devices.host_buffers import to_device
from gptq_cli.engine.calls import BlockCall, moved
from gptq_cli.engine.capture import StopForward
from gptq_cli.engine.frames import (
    DATA_DEPENDENT,
    Frame,
    Sharing,
    follower_hook,
    leader_hook,
    residuals_of_frame,
    sharing_hook,
)
from gptq_cli.engine.residuals import BLOCK_INPUT, Residual, Source
from gptq_cli.engine.stages import Stage
from gptq_cli.errors import GptqError


class Forwards(Protocol):
    """The two ways share this face; the list of hidden states handed to them is consumed."""

    place: int
    """Which micro-batch `inputs` gave last."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def inputs(self, stages: Sequence[Stage]) -> Iterator[tuple[Stage, Tensor]]:
        """Each stage's input (batch, seq_len, K), micro-batch after micro-batch.

        Stages given together see the block as it is now; stages given one after the other see what was
        quantized in between.
        """
        ...

    def again(self, stage: Stage, place: int) -> list[Tensor]:
        """The input of `stage` for micro-batch number `place` once more, after `inputs` came to its end; one
        for each time that its linear ran."""
        ...

    def residual(self, stage: Stage) -> Tensor | None:
        """What the output of the stage's linear is added to (batch, seq_len, hidden_size), for the
        micro-batch that `inputs` gave last, as far as it is known; None where it is not. To be called once a
        micro-batch.
        """
        ...

    def finish(self) -> list[Any]:
        """Run to the end of the block; what it returned for each micro-batch, in order."""
        ...


class ReplayedForwards:
    """Runs each forward again for each call of `inputs`, and stops it as soon as all inputs are seen."""

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        stages: Sequence[Stage],
        calls: Sequence[BlockCall],
        hidden: list[Tensor],
        residuals: Mapping[str, Residual] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`device`: where the block is, if hidden states rest elsewhere."""
        self._block, self._device = block, device
        self._linears = linears
        self._calls = calls
        self._hidden = hidden
        self._stages = stages
        self._sources = {name: residual.sources for name, residual in (residuals or {}).items()}
        self._beside: dict[Source, Tensor] = {}
        self.place = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def inputs(self, stages: Sequence[Stage]) -> Iterator[tuple[Stage, Tensor]]:
        """See `Forwards.inputs`. A stage that is not `once` yields a tensor for each time its linear ran."""
        caught: list[tuple[Stage, Tensor]] = []
        may_stop = all(stage.once for stage in stages)

        def hook_of(stage: Stage) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                caught.append((stage, args[0]))
                if may_stop and len(caught) == len(stages):
                    raise StopForward

            return hook

        handles = [self._linears[stage.leader].register_forward_pre_hook(hook_of(stage)) for stage in stages]
        wanted = {source for stage in stages for source in self._sources.get(stage.leader, ())}
        handles += _notes(self._block, wanted, lambda: self._beside)
        try:
            for place, (call, hidden) in enumerate(zip(self._calls, self._hidden, strict=True)):
                entering = to_device(hidden, self._device or hidden.device)
                self.place, self._beside = place, {BLOCK_INPUT: entering}
                with suppress(StopForward), torch.no_grad():
                    call.to(entering.device).rehearse(self._block, entering)
                del entering
                while caught:
                    yield caught.pop(0)
        finally:
            self._beside = {}
            for handle in handles:
                handle.remove()

    def again(self, stage: Stage, place: int) -> list[Tensor]:
        """See `Forwards.again`; all forwards up to that one are run again."""
        found = []
        for _, x in self.inputs([stage]):
            if self.place > place:
                break
            if self.place == place:
                found.append(x)
        return found

    def residual(self, stage: Stage) -> Tensor | None:
        """See `Forwards.residual`."""
        return _total(self._sources.get(stage.leader, ()), self._beside)

    def finish(self) -> list[Any]:
        """See `Forwards.finish`. Also proves what the traced sample promised, as `ParkedForwards` does."""
        sharing = Sharing()
        handles = []
        for stage in self._stages:
            for name in stage.linears if len(stage.linears) > 1 else ():
                hook = sharing_hook(stage, name, sharing)
                handles.append(self._linears[name].register_forward_pre_hook(hook))
        outputs: list[Any] = []
        try:
            with torch.no_grad():
                for call in self._calls:
                    hidden = self._hidden.pop(0)
                    rest = hidden.device
                    outputs.append(moved(call(self._block, to_device(hidden, self._device or rest)), rest))
                    del hidden
                    sharing.end()
        finally:
            for handle in handles:
                handle.remove()
        return outputs


class ParkedForwards:
    """Keeps each forward in a thread, parked at the stage that comes next."""

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        stages: Sequence[Stage],
        calls: Sequence[BlockCall],
        hidden: list[Tensor],
        residuals: Mapping[str, Residual] | None = None,
    ) -> None:
        self._sources = {name: residual.sources for name, residual in (residuals or {}).items()}
        wanted = {source for sources in self._sources.values() for source in sources}
        self._last_use = {s: stage.leader for stage in stages for s in self._sources.get(stage.leader, ())}
        keeps_input = BLOCK_INPUT in wanted
        self._frames = [Frame(block, call, hidden, keeps_input=keeps_input) for call in calls]
        self._last: Frame | None = None
        self.place = 0
        self._hooks = _notes(block, wanted, residuals_of_frame)
        for stage in stages:
            self._hooks.append(linears[stage.leader].register_forward_pre_hook(leader_hook(stage)))
            for name in stage.linears[1:]:
                self._hooks.append(linears[name].register_forward_pre_hook(follower_hook(stage.leader, name)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for frame in self._frames:
            frame.cancel()
        self._frames.clear()
        self._last = None
        for hook in self._hooks:
            hook.remove()

    def inputs(self, stages: Sequence[Stage]) -> Iterator[tuple[Stage, Tensor]]:
        """See `Forwards.inputs`; one stage at a time, in the order of the forward."""
        (stage,) = stages
        for place, frame in enumerate(self._frames):
            x = frame.advance()
            if x is None or frame.parked_at != stage.leader:
                raise GptqError(
                    f"a forward reached {frame.parked_at or 'its end'!r}, {stage.leader!r} was expected",
                    hint=DATA_DEPENDENT,
                )
            self._last, self.place = frame, place
            yield stage, x
            del x

    def again(self, stage: Stage, place: int) -> list[Tensor]:
        """See `Forwards.again`; the forward is parked there and holds it."""
        x = self._frames[place].parked_input
        return [] if x is None else [x]

    def residual(self, stage: Stage) -> Tensor | None:
        """See `Forwards.residual`."""
        if self._last is None:
            return None
        sources, beside = self._sources.get(stage.leader, ()), self._last.beside
        total = _total(sources, beside)
        for source in sources:
            if self._last_use[source] == stage.leader:
                beside.pop(source, None)
        return total

    def finish(self) -> list[Any]:
        """See `Forwards.finish`."""
        outputs: list[Any] = []
        for frame in self._frames:
            if frame.advance() is not None:
                raise GptqError(
                    f"a forward came to {frame.parked_at!r} a second time",
                    hint=DATA_DEPENDENT,
                )
            outputs.append(frame.take_output())
        return outputs


def unhooked_copy(block: nn.Module) -> nn.Module:
    """A copy of `block` with weights of its own and without the hooks that accelerate hung on it.

    A hook of an offload chain refers to the module before it, so copying hooks would copy the model.
    """
    own = ("_hf_hook", "_old_forward", "forward")
    memo = {id(m.__dict__[key]): None for m in block.modules() for key in own if key in m.__dict__}
    dense = copy.deepcopy(block, memo)
    for module in dense.modules():
        for key in own:
            module.__dict__.pop(key, None)
    return dense


def _notes(
    block: nn.Module, sources: Iterable[Source], place: Callable[[], dict[Source, Tensor] | None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that keep what is seen at `sources` for the forward that runs."""

    def note(source: Source, value: Any) -> None:
        beside = place()
        if beside is not None:
            beside[source] = value

    handles = []
    for source in sorted(set(sources) - {BLOCK_INPUT}):
        module = block.get_submodule(source.module)
        if source.output:
            handles.append(module.register_forward_hook(lambda _, args, output, at=source: note(at, output)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, args, at=source: note(at, args[0])))
    return handles


def _total(sources: Sequence[Source], beside: Mapping[Source, Tensor]) -> Tensor | None:
    """The sum of what was seen at `sources`, in float32 if there are several; None if one is missing."""
    if not sources or any(source not in beside for source in sources):
        return None
    first, *others = (beside[source] for source in sources)
    return sum((other.float().view_as(first) for other in others), first.float()) if others else first
