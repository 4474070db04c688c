"""The model's own forward, kept open from block to block.

Where the flow of a model is not direct (`model.flow`), something happens between two blocks that only the
model's own code knows: the second value that a block returned is handed to the next one, several streams are
mixed, keys and values of one block are read by another. So that code runs. Each micro-batch's forward of the
model is a thread, which waits at each block. The engine takes the arguments that the block is called with,
works on the block as always, and gives back what the quantized block returned: the forward goes on with that
to its next block. Exactly one thread runs at any time.

The paired samples have a second forward each, which is given what the dense copy of each block returned. So
each stream has states and shared keys and values of its own.

What it costs is memory: a forward that is kept open holds its own variables, most often the embeddings
beside the hidden states, and the masks, once per micro-batch. Models with a direct flow do without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.devices.accelerators import working_on
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.engine.calls import UNSUPPORTED, BlockCall, moved, taken
from gptq_cli.engine.capture import (
    PROBE_TOKENS,
    BlockInputs,
    replaced_forward,
    samples_of,
)
from gptq_cli.engine.pausing_forward import PausingForward
from gptq_cli.errors import GptqError
from gptq_cli.model.flow import Carrier, Flow, find_carrier
from gptq_cli.ranks.team import ALONE, Team


class ModelForward(PausingForward):
    """One micro-batch's forward of the model, which pauses at each block."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        super().__init__("gptq-model")
        self._model, self._ids = model, ids
        self.tokens = ids.shape[1]
        self.pending: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        """Where it waits already, until that is asked for."""
        self._arrived: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        self._result: Any = None

    def advance(self, result: Any = None) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
        """Let the forward run to its next block, with the `result` of the one that it waits at: the number
        of the next block and its arguments. Raises `GptqError` where there is none."""
        self._result = result
        self.resume()
        arrived, self._arrived = self._arrived, None
        if arrived is None:
            raise GptqError("the model's forward never called its last block", hint=UNSUPPORTED)
        return arrived

    def wait_at(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in this thread in place of block `index`; returns what the engine gives back."""
        self._arrived = (index, args, kwargs)
        del args, kwargs
        self.pause()
        result, self._result = self._result, None
        return result

    def forward(self) -> None:
        with working_on(self._ids.device), torch.no_grad():
            self._model(input_ids=self._ids, use_cache=False)


class Driven:
    """The hidden states of all samples, inside forwards of the model that are kept open: a `HiddenStates`.

    `model` is the decoder without its head; `between` is a context inside which its modules outside the
    blocks can run. The arguments are those of `capture.capture`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        input_ids: Tensor,  # (samples, seq_len) int64
        flow: Flow,
        *,
        batch_size: int,
        input_device: torch.device,
        paired_samples: int = 0,
        team: Team = ALONE,
        between: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._blocks, self._flow, self._between = list(blocks), flow, between
        self.share = samples_of(team, input_ids, paired_samples, batch_size)

        def opened(batch: tuple[int, ...]) -> ModelForward:
            return ModelForward(model, input_ids[list(batch)].to(input_device))

        self._forwards = [opened(batch) for batch in self.share.batches]
        self._dense = [opened(batch) for batch in self.share.batches[: self.paired]]
        self._probe = ModelForward(model, input_ids[:1, :PROBE_TOKENS].to(input_device))
        self._outputs: list[Any] = [None] * len(self._forwards)
        self._dense_outputs: list[Any] = [None] * len(self._dense)
        self._probe_output: Any = None
        self._device: torch.device | None = None
        """Where the block before was worked on."""

    @property
    def paired(self) -> int:
        """See `HiddenStates.paired`."""
        return self.share.paired

    def start(self, advanced: Callable[[int], None] = lambda done: None) -> None:
        """Let every forward run to the first block; `advanced` hears the number of samples done."""
        done = 0
        with self._running():
            for forward in (self._probe, *self._dense):
                forward.pending = forward.advance()
            for batch, forward in zip(self.share.batches, self._forwards, strict=True):
                forward.pending = forward.advance()
                done += len(batch)
                advanced(done)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The forwards run inside the `with`, and wait where they come to a block."""
        with self._between(), ExitStack() as stack:
            for number, block in enumerate(self._blocks):
                stack.enter_context(replaced_forward(block, _waiting(number)))
            try:
                yield
            except BaseException:
                self.close()  # as long as a forward still stops at the next block, which may be soon
                raise

    def enter(self, index: int, device: torch.device, rest: torch.device) -> BlockInputs:
        """Let every forward run to block `index`; see `HiddenStates.enter`."""
        calls: list[BlockCall] = []
        hidden: list[Tensor] = []
        dense_calls: list[BlockCall] = []
        dense: list[Tensor] = []
        with self._running():
            probe, probe_hidden = self._next(self._probe, self._probe_output, index, device)
            for forward in self._forwards:
                call, entering = self._next(forward, self._outputs.pop(0), index, device)
                calls.append(call)
                hidden.append(to_device(entering, rest))
            for forward in self._dense:
                call, entering = self._next(forward, self._dense_outputs.pop(0), index, device)
                dense_calls.append(call)
                dense.append(to_device(entering, rest))
        self._probe_output, self._device = None, device
        return BlockInputs(
            calls=calls,
            hidden=hidden,
            dense_calls=dense_calls,
            dense=dense,
            probe=probe,
            probe_hidden=probe_hidden,
            probe_tokens=self._probe.tokens if probe_hidden.dim() > 3 else _rows(probe_hidden),
            share=self.share,
        )

    def leave(self, block: nn.Module, inputs: BlockInputs, outputs: list[Any], dense: list[Any]) -> None:
        """See `HiddenStates.leave`. The probe goes on with what the quantized block makes of it."""
        with torch.no_grad():
            self._probe_output = inputs.probe(block, inputs.probe_hidden)
        self._outputs, self._dense_outputs = outputs, dense

    def close(self) -> None:
        """End every forward."""
        for forward in (*self._forwards, *self._dense, self._probe):
            forward.cancel()
        self._outputs.clear()
        self._dense_outputs.clear()
        self._probe_output = None

    def _next(
        self, forward: ModelForward, result: Any, index: int, device: torch.device
    ) -> tuple[BlockCall, Tensor]:
        """How `forward` calls block `index`, and the hidden states that it gives to it."""
        if self._device is not None:  # what a block returns may have rested elsewhere
            result = moved(result, self._device)
        arrived, args, kwargs = forward.pending or forward.advance(result)
        forward.pending = None
        name = self._flow.blocks[index]
        if arrived != index:
            raise GptqError(
                f"the model came to {self._flow.blocks[arrived]}, {name} was expected", hint=UNSUPPORTED
            )
        carrier = self._carrier(name, args, kwargs)
        hidden, args, kwargs = taken(args, kwargs, carrier)
        if hidden is None:
            raise GptqError(f"the model's forward calls {name} without hidden states", hint=UNSUPPORTED)
        call = BlockCall(args, kwargs, carrier, writes=name in self._flow.written)
        return call.to(device), hidden.to(device)

    def _carrier(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Carrier:
        shape = self._flow.shapes.get(name)
        return find_carrier(args, kwargs) if shape is None else shape.carrier


def _rows(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1]


def _waiting(index: int) -> Callable[..., Any]:
    """In place of the forward of block `index`, for the thread of a `ModelForward`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        thread = threading.current_thread()
        assert isinstance(thread, ModelForward)
        return thread.wait_at(index, args, kwargs)

    return forward
