"""What enters the decoder blocks.

A causal language model is `embed -> block 0 -> … -> block L-1 -> norm -> head`. The engine runs the
blocks itself, one at a time over all calibration samples, so it needs the hidden states that enter
block 0 and the *other* arguments that the model hands to every block: masks, position embeddings,
ALiBi biases, per-layer switches. Architectures differ in all of them, so nothing is rebuilt here:
the model's own forward runs over each micro-batch with every block's forward replaced by a recorder
that notes its arguments and passes the hidden states through. The embedding is the only real work.

Equal argument tensors are stored once (the mask of one micro-batch is the mask of the next).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.devices.accelerators import working_on
from gptq_cli.devices.fp32_matmul import matmul_scope
from gptq_cli.errors import GptqError

PROBE_TOKENS = 16
"""Length of the sample that `find_stages` traces: enough to run every linear, too short to cost anything."""

_UNSUPPORTED = "this architecture cannot be quantized block by block; report it with the model's config.json"


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a forward to end it early; caught by this type alone, by whoever planted it."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How the model calls one block for one micro-batch, the hidden states left out."""

    args: tuple[Any, ...]
    """Positional arguments after the hidden states."""
    kwargs: dict[str, Any]
    by_keyword: str | None
    """The keyword under which the hidden states are passed, None when they come first."""

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run `block` on `hidden` (batch, seq_len, hidden_size) and return its hidden states."""
        with matmul_scope(hidden.dtype, hidden.device):
            if self.by_keyword is None:
                output = block(hidden, *self.args, **self.kwargs)
            else:
                output = block(*self.args, **{self.by_keyword: hidden}, **self.kwargs)
        return hidden_of(output)

    def to(self, device: torch.device) -> BlockCall:
        """The same call with every tensor on `device`."""
        return BlockCall(_moved(self.args, device), _moved(self.kwargs, device), self.by_keyword)


@dataclass(slots=True)
class Captured:
    """Everything that the block loop needs. `hidden` is consumed and replaced, block after block."""

    hidden: list[Tensor]
    """One (batch, seq_len, hidden_size) tensor per micro-batch."""
    calls: list[list[BlockCall]]
    """`calls[block][micro_batch]`."""
    probes: list[BlockCall]
    """How each block is called for the first `PROBE_TOKENS` tokens of the first sample alone."""
    samples: list[tuple[int, ...]] = field(default_factory=list)
    """Which calibration samples make up each micro-batch."""
    paired: int = 0
    """So many micro-batches, the first ones, are run through the dense model too."""
    dense: list[Tensor] = field(default_factory=list)
    """`hidden` of the paired micro-batches for the model as it was before anything was quantized."""

    @property
    def paired_samples(self) -> int:
        """Calibration samples in the paired micro-batches."""
        return sum(len(batch) for batch in self.samples[: self.paired])


def spread(count: int, wanted: int) -> tuple[int, ...]:
    """`wanted` evenly spread numbers of 0 … count - 1, the last one among them."""
    return tuple((i + 1) * count // wanted - 1 for i in range(wanted))


def micro_batches(samples: Sequence[int], batch_size: int) -> list[tuple[int, ...]]:
    """`samples` in pieces of `batch_size`; the last may be short."""
    return [tuple(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]


def hidden_of(output: object) -> Tensor:
    """The hidden states in what a block returned: the tensor itself, or the first of a tuple."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise GptqError(
            f"a decoder block returned {type(output).__name__}; expected a tensor or a tuple of tensors",
            hint=_UNSUPPORTED,
        )
    return first


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


class _Interner:
    """Returns one stored tensor for all equal ones; within a micro-batch it knows them by identity."""

    def __init__(self) -> None:
        self._unique: list[Tensor] = []
        self._seen: list[tuple[Tensor, Tensor]] = []

    def new_micro_batch(self) -> None:
        self._seen.clear()

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self(item) for item in value))
        if isinstance(value, tuple | list):
            return type(value)(self(item) for item in value)
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        for original, stored in self._seen:
            if original is tensor:
                return stored
        for stored in self._unique:
            same_kind = stored.shape == tensor.shape and stored.dtype == tensor.dtype
            if same_kind and stored.device == tensor.device and torch.equal(stored, tensor):
                break
        else:
            stored = tensor
            self._unique.append(tensor)
        self._seen.append((tensor, stored))
        return stored


@contextmanager
def replaced_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Call `forward` in place of `block.forward` inside the `with`; yields the original."""
    had_own = "forward" in block.__dict__
    original = block.forward
    block.forward = forward
    try:
        yield original
    finally:
        if had_own:
            block.forward = original
        else:
            del block.forward


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    input_ids: Tensor,  # (samples, seq_len) int64
    *,
    batch_size: int,
    input_device: torch.device,
    block_device: torch.device | None = None,
    rest_device: torch.device | None = None,
    paired_samples: int = 0,
    advanced: Callable[[int], None] = lambda done: None,
) -> Captured:
    """Run the embedding over all samples and note how every block is called.

    `model` is the decoder without its head (`model.base_model`); `input_ids` enter it on `input_device`,
    hidden states stay where the model left them, or go to `rest_device`. `block_device` is where the first
    block works, if elsewhere. `paired_samples` of them, evenly spread over the text, are paired and come
    first, in micro-batches of their own, so that which samples they are does not depend on `batch_size`.
    `advanced` hears the number of samples done.
    Raises `GptqError` when the forward does not visit every block once, in order.
    """
    works_on = block_device or input_device
    probe, recorder = _Recorder(blocks, works_on), _Recorder(blocks, works_on)
    _record(model, blocks, input_ids[:1, :PROBE_TOKENS].to(input_device), probe)
    pairs = spread(len(input_ids), paired_samples)
    alone = [number for number in range(len(input_ids)) if number not in set(pairs)]
    paired = micro_batches(pairs, batch_size)
    batches = [*paired, *micro_batches(alone, batch_size)]
    done = 0
    for batch in batches:
        _record(model, blocks, input_ids[list(batch)].to(input_device), recorder)
        if rest_device is not None:
            recorder.hidden[-1] = recorder.hidden[-1].to(rest_device)
        done += len(batch)
        advanced(done)
    return Captured(
        hidden=recorder.hidden,
        calls=recorder.calls,
        probes=[calls[0] for calls in probe.calls],
        samples=batches,
        paired=len(paired),
        dense=recorder.hidden[: len(paired)],
    )


def _record(model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor, recorder: _Recorder) -> None:
    recorder.intern.new_micro_batch()
    with working_on(ids.device), torch.no_grad(), ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, recorder.forward_of(index, block.forward)))
        try:
            model(input_ids=ids, use_cache=False)
        except StopForward:
            return
    raise GptqError("the model's forward never called its last block", hint=_UNSUPPORTED)


class _Recorder:
    """The stand-ins for the blocks' forwards during `capture`."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self.hidden: list[Tensor] = []
        self.calls: list[list[BlockCall]] = [[] for _ in blocks]
        self.intern = _Interner()
        self._last = len(blocks) - 1
        self._returns_tuple: bool | None = None

    def forward_of(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            keyword = None if args else next(k for k, value in kwargs.items() if isinstance(value, Tensor))
            hidden: Tensor = args[0] if keyword is None else kwargs.pop(keyword)
            if index == 0:
                self.hidden.append(hidden)
            call = BlockCall(self.intern(args[1:]), self.intern(kwargs), keyword)
            self.calls[index].append(call)
            if index == self._last:
                raise StopForward
            if self._returns_tuple is None:  # ask the real block once what shape its answer has
                named = {} if keyword is None else {keyword: hidden.clone()}
                first = (hidden.clone(),) if keyword is None else ()
                with working_on(self._device):
                    answer = original(*first, *args[1:], **named, **kwargs)
                self._returns_tuple = isinstance(answer, tuple)
            return (hidden,) if self._returns_tuple else hidden

        return forward
