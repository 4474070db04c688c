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
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from gptq_cli.devices.accelerators import working_on
from gptq_cli.engine.capture import BlockCall, StopForward
from gptq_cli.engine.residuals import BLOCK_INPUT
from gptq_cli.engine.stages import Stage
from gptq_cli.errors import GptqError
from gptq_cli.model.reads import Read

_DATA_DEPENDENT = (
    "which linears share an input depends on the data here; report it with the model's config.json"
)


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

    def residual(self, stage: Stage) -> Tensor | None:
        """What the output of the stage's linear is added to (batch, seq_len, hidden_size), for the
        micro-batch that `inputs` gave last; None where that is not known. To be called once a micro-batch.
        """
        ...

    def finish(self) -> list[Tensor]:
        """Run to the end of the block; its outputs (batch, seq_len, hidden_size), in order."""
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
        residuals: Mapping[str, str] | None = None,
    ) -> None:
        self._block = block
        self._linears = linears
        self._calls = calls
        self._hidden = hidden
        self._stages = stages
        self._sources = residuals or {}
        self._beside: dict[str, Tensor] = {}
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
        for source in {self._sources[stage.leader] for stage in stages if stage.leader in self._sources}:
            if source != BLOCK_INPUT:
                module = self._block.get_submodule(source)
                handles.append(module.register_forward_pre_hook(_noting(source, lambda: self._beside)))
        try:
            for place, (call, hidden) in enumerate(zip(self._calls, self._hidden, strict=True)):
                self.place, self._beside = place, {BLOCK_INPUT: hidden}
                with suppress(StopForward), torch.no_grad():
                    call(self._block, hidden)
                while caught:
                    yield caught.pop(0)
        finally:
            self._beside = {}
            for handle in handles:
                handle.remove()

    def residual(self, stage: Stage) -> Tensor | None:
        """See `Forwards.residual`."""
        source = self._sources.get(stage.leader)
        return None if source is None else self._beside.get(source)

    def finish(self) -> list[Tensor]:
        """See `Forwards.finish`. Also proves what the traced sample promised, as `ParkedForwards` does."""
        sharing = _Sharing()
        handles = []
        for stage in self._stages:
            for name in stage.linears if len(stage.linears) > 1 else ():
                hook = _proving_hook(stage, name, sharing)
                handles.append(self._linears[name].register_forward_pre_hook(hook))
        outputs = []
        try:
            with torch.no_grad():
                for call in self._calls:
                    outputs.append(call(self._block, self._hidden.pop(0)))
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
        residuals: Mapping[str, str] | None = None,
    ) -> None:
        self._sources = residuals or {}
        keeps_input = BLOCK_INPUT in self._sources.values()
        self._frames = [_Frame(block, call, hidden, keeps_input=keeps_input) for call in calls]
        self._last: _Frame | None = None
        self.place = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for source in set(self._sources.values()) - {BLOCK_INPUT}:
            module = block.get_submodule(source)
            self._hooks.append(module.register_forward_pre_hook(_noting(source, _beside_frame)))
        for stage in stages:
            self._hooks.append(linears[stage.leader].register_forward_pre_hook(_leader_hook(stage)))
            for name in stage.linears[1:]:
                self._hooks.append(
                    linears[name].register_forward_pre_hook(_follower_hook(stage.leader, name))
                )

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
                    hint=_DATA_DEPENDENT,
                )
            self._last, self.place = frame, place
            yield stage, x
            del x

    def residual(self, stage: Stage) -> Tensor | None:
        """See `Forwards.residual`."""
        source = self._sources.get(stage.leader)
        return None if source is None or self._last is None else self._last.beside.pop(source, None)

    def finish(self) -> list[Tensor]:
        """See `Forwards.finish`."""
        outputs = []
        for frame in self._frames:
            if frame.advance() is not None:
                raise GptqError(
                    f"a forward came to {frame.parked_at!r} a second time",
                    hint=_DATA_DEPENDENT,
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


def _noting(
    source: str, place: Callable[[], dict[str, Tensor] | None]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Keeps the first input of the module `source` for the forward that runs."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        beside = place()
        if beside is not None:
            beside[source] = args[0]

    return hook


def _beside_frame() -> dict[str, Tensor] | None:
    frame = threading.current_thread()
    return frame.beside if isinstance(frame, _Frame) else None


def _leader_hook(stage: Stage) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Parks the frame that comes to `stage`; a forward outside any frame passes."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        frame = threading.current_thread()
        if isinstance(frame, _Frame):
            frame.park(stage, args[0])

    return hook


def _follower_hook(leader: str, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Proves for every micro-batch what the traced sample promised: `name` reads what `leader` read."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        frame = threading.current_thread()
        if isinstance(frame, _Frame):
            frame.sharing.follow(leader, name, args[0])

    return hook


def _proving_hook(stage: Stage, name: str, sharing: _Sharing) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """The same for a forward that runs to its end in one go: the leader comes first and notes its input."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if name == stage.leader:
            sharing.lead(stage, args[0])
        else:
            sharing.follow(stage.leader, name, args[0])

    return hook


class _Sharing:
    """Proves for one forward that the linears of a stage read one tensor.

    What a leader read is held until the last of its followers has read it, which is as long as the block's
    own forward needs it: an address alone would be given to another tensor as soon as this one is gone.
    """

    def __init__(self) -> None:
        self._read: dict[str, Read] = {}
        self._missing: dict[str, set[str]] = {}

    def lead(self, stage: Stage, x: Tensor) -> None:
        """The leader of `stage` reads `x`."""
        followers = set(stage.linears[1:])
        if followers:
            self._read[stage.leader], self._missing[stage.leader] = Read.of(x), followers

    def follow(self, leader: str, name: str, x: Tensor) -> None:
        """`name` reads `x`. Raises `GptqError` unless that is what `leader` read before it."""
        read = self._read.get(leader)
        if read is None or not read.same(Read.of(x)):
            raise _parted(leader, name)
        self._missing[leader].discard(name)
        if not self._missing[leader]:
            del self._read[leader], self._missing[leader]

    def end(self) -> None:
        """The forward is over. Raises `GptqError` when a linear of a stage never ran."""
        for leader, missing in self._missing.items():
            raise _parted(leader, min(missing))


def _parted(leader: str, name: str) -> GptqError:
    return GptqError(
        f"{name!r} and {leader!r} shared their input for the traced sample but not for a later one",
        hint=_DATA_DEPENDENT,
    )


class _Frame(threading.Thread):
    """One micro-batch's forward. The engine's thread and this one never run at the same time."""

    def __init__(
        self, block: nn.Module, call: BlockCall, hidden: list[Tensor], *, keeps_input: bool = False
    ) -> None:
        super().__init__(daemon=True, name="gptq-forward")
        self.parked_at: str | None = None
        self.sharing = _Sharing()
        self.beside: dict[str, Tensor] = {}
        """Residuals, by where they were found, until the stage that needs them takes them."""
        self._keeps_input = keeps_input
        self._block = block
        self._call = call
        self._hidden: list[Tensor] = hidden
        self._go = threading.Semaphore(0)
        self._yielded = threading.Semaphore(0)
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._error: BaseException | None = None
        self._cancelled = False

    # -- the engine's side

    def advance(self) -> Tensor | None:
        """Let the forward run to its next park; that stage's input, or None when it came to its end."""
        if self.ident is None:
            self.start()
        self._go.release()
        self._yielded.acquire()
        if self._error is not None:
            raise self._error
        x, self._input = self._input, None
        return x

    def take_output(self) -> Tensor:
        """The block's output, once."""
        output, self._output = self._output, None
        if output is None:
            raise GptqError("a forward ended without an output")
        return output

    def cancel(self) -> None:
        """End the forward where it is parked; its memory is free when this returns."""
        if self.ident is not None and self.is_alive():
            self._cancelled = True
            self._go.release()
            self.join()

    # -- the forward's side

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                entering = self._hidden.pop(0)
                if self._keeps_input:
                    self.beside[BLOCK_INPUT] = entering
                with working_on(entering.device), torch.no_grad():
                    self._output = self._call(self._block, entering)
                self.sharing.end()
        except StopForward:
            self._output = None
        except BaseException as error:  # noqa: BLE001 - carried to the engine's thread, raised there
            self._error = error
        self.parked_at = None
        self._yielded.release()

    def park(self, stage: Stage, x: Tensor) -> None:
        """Hand `x` to the engine and wait until the stage is quantized."""
        self.parked_at = stage.leader
        self._input = x
        self.sharing.lead(stage, x)
        del x
        self._yielded.release()
        self._go.acquire()
        if self._cancelled:
            raise StopForward
