"""What enters the decoder blocks.

A causal language model is `embed -> block 0 -> … -> block L-1 -> norm -> head`. The engine runs the
blocks itself, one at a time over all calibration samples, so it needs the hidden states that enter
block 0 and the *other* arguments that the model hands to every block: masks, position embeddings,
ALiBi biases, per-layer switches. Architectures differ in all of them, so nothing is rebuilt here:
the model's own forward runs over each micro-batch with every block's forward replaced by a recorder
that notes its arguments and passes the hidden states through. The embedding is the only real work.

That is right where the flow is direct (`model.flow`): what one block returns is what the next one is given,
and no other argument depends on a block. The recorder checks the first for every micro-batch. Where the flow
is not direct, the model's own forwards stay open and run on between the blocks: `engine.driven`.

Equal argument tensors are stored once (the mask of one micro-batch is the mask of the next).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptq_cli.devices.accelerators import working_on
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.engine.calls import UNSUPPORTED, BlockCall, taken
from gptq_cli.errors import GptqError
from gptq_cli.gptq.first_token import shared_start
from gptq_cli.model.flow import Flow
from gptq_cli.ranks.leaves import Share
from gptq_cli.ranks.team import ALONE, Team, share_samples

PROBE_TOKENS = 16
"""Length of the sample that `find_stages` traces: enough to run every linear, too short to cost anything."""


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a forward to end it early; caught by this type alone, by whoever set the hook."""


@dataclass(slots=True, kw_only=True)
class BlockInputs:
    """What enters one block; `hidden` and `dense` are consumed while it is worked on."""

    calls: list[BlockCall]
    """One per micro-batch."""
    hidden: list[Tensor]
    """The hidden states of each micro-batch, most often (batch, seq_len, hidden_size)."""
    dense_calls: list[BlockCall]
    """The same of the paired micro-batches, the first ones, in the model as it was before anything was
    quantized."""
    dense: list[Tensor]
    probe: BlockCall
    """How the block is called for the first tokens of the first sample alone, batch 1."""
    probe_hidden: Tensor
    probe_tokens: int
    share: Share
    """The calibration samples, in micro-batches."""

    @property
    def samples(self) -> list[tuple[int, ...]]:
        """Which calibration samples make up each micro-batch."""
        return self.share.batches

    @property
    def paired(self) -> int:
        """So many micro-batches, the first ones, are run through the dense model too."""
        return self.share.paired


class HiddenStates(Protocol):
    """The hidden states of all samples on their way from block to block."""

    @property
    def paired(self) -> int:
        """So many micro-batches, the first ones, are run through the dense model too."""
        ...

    def enter(self, index: int, device: torch.device, rest: torch.device) -> BlockInputs:
        """What enters block `index`, which is worked on at `device`; the hidden states on `rest`."""
        ...

    def leave(self, block: nn.Module, inputs: BlockInputs, outputs: list[Any], dense: list[Any]) -> None:
        """What the quantized `block` returned for each micro-batch, its dense copy for the paired ones."""
        ...

    def close(self) -> None:
        """Free what is held. To be called once, also after an error."""
        ...


@dataclass(slots=True)
class Captured:
    """The hidden states of a direct flow. `hidden` is consumed and replaced, block after block."""

    hidden: list[Tensor]
    """One (batch, seq_len, hidden_size) tensor per micro-batch."""
    calls: list[list[BlockCall]]
    """`calls[block][micro_batch]`."""
    probes: list[BlockCall]
    """How each block is called for the first `PROBE_TOKENS` tokens of the first sample alone."""
    share: Share
    """The calibration samples, in micro-batches."""
    dense: list[Tensor] = field(default_factory=list)
    """`hidden` of the paired micro-batches for the model as it was before anything was quantized."""

    @property
    def samples(self) -> list[tuple[int, ...]]:
        """Which calibration samples make up each micro-batch."""
        return self.share.batches

    @property
    def paired(self) -> int:
        """So many micro-batches, the first ones, are run through the dense model too."""
        return self.share.paired

    def enter(self, index: int, device: torch.device, rest: torch.device) -> BlockInputs:
        """See `HiddenStates.enter`. How the block is called leaves `calls` here."""
        self.hidden[:] = [to_device(hidden, rest) for hidden in self.hidden]
        self.dense[:] = [to_device(hidden, rest) for hidden in self.dense]
        calls = [call.to(device) for call in self.calls[index]]
        self.calls[index] = []
        sample = self.hidden[0][:1, :PROBE_TOKENS].to(device)
        return BlockInputs(
            calls=calls,
            hidden=self.hidden,
            dense_calls=calls[: self.paired],
            dense=self.dense,
            probe=self.probes[index].to(device),
            probe_hidden=sample,
            probe_tokens=sample.shape[1],
            share=self.share,
        )

    def leave(self, block: nn.Module, inputs: BlockInputs, outputs: list[Any], dense: list[Any]) -> None:
        """See `HiddenStates.leave`."""
        self.hidden[:], self.dense[:] = outputs, dense

    def close(self) -> None:
        """Nothing is held open."""


def spread(count: int, wanted: int) -> tuple[int, ...]:
    """`wanted` evenly spread numbers of 0 … count - 1, the last one among them."""
    return tuple((i + 1) * count // wanted - 1 for i in range(wanted))


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
    flow: Flow,
    *,
    batch_size: int,
    input_device: torch.device,
    rest_device: torch.device | None = None,
    paired_samples: int = 0,
    advanced: Callable[[int], None] = lambda done: None,
    team: Team = ALONE,
) -> Captured:
    """Run the embedding over this rank's samples and note how every block is called; the flow is direct.

    `model` is the decoder without its head (`model.base_model`); `input_ids` enter it on `input_device`,
    hidden states stay where the model left them, or go to `rest_device`. `paired_samples` of them, evenly
    spread over the text, are paired and come first, in micro-batches of their own, so that which samples they
    are does not depend on `batch_size`. `advanced` hears the number of samples done.
    Raises `GptqError` when the forward does not visit every block once, in order, or does not hand on what a
    block returned.
    """
    probe, recorder = _Recorder(flow, len(blocks)), _Recorder(flow, len(blocks))
    _record(model, blocks, input_ids[:1, :PROBE_TOKENS].to(input_device), probe)
    share = samples_of(team, input_ids, paired_samples, batch_size)
    done = 0
    for batch in share.batches:
        _record(model, blocks, input_ids[list(batch)].to(input_device), recorder)
        if rest_device is not None:
            recorder.hidden[-1] = to_device(recorder.hidden[-1], rest_device)
        done += len(batch)
        advanced(done)
    return Captured(
        hidden=recorder.hidden,
        calls=recorder.calls,
        probes=[calls[0] for calls in probe.calls],
        share=share,
        dense=[hidden.clone() if flow.written else hidden for hidden in recorder.hidden[: share.paired]],
    )


def samples_of(team: Team, input_ids: Tensor, paired_samples: int, batch_size: int) -> Share:
    """The samples that this rank works on, in micro-batches, of which the first ones are paired."""
    pairs = spread(len(input_ids), paired_samples)
    others = [number for number in range(len(input_ids)) if number not in set(pairs)]
    share = share_samples(team, pairs, others, batch_size)
    return replace(share, one_start=shared_start(input_ids))


def _record(model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor, recorder: _Recorder) -> None:
    recorder.begin()
    with working_on(ids.device), torch.no_grad(), ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, recorder.forward_of(index)))
        try:
            model(input_ids=ids, use_cache=False)
        except StopForward:
            return
    raise GptqError("the model's forward never called its last block", hint=UNSUPPORTED)


class _Recorder:
    """The stand-ins for the blocks' forwards during `capture`."""

    def __init__(self, flow: Flow, count: int) -> None:
        """`count`: so many blocks, the first ones."""
        self._flow = flow
        self._passed: tuple[int, Tensor | None] = (-1, None)  # the block that ran last, and what it returned
        self.hidden: list[Tensor] = []
        self.calls: list[list[BlockCall]] = [[] for _ in range(count)]
        self._intern = _Interner()

    def begin(self) -> None:
        """A forward begins."""
        self._intern.new_micro_batch()
        self._passed = (-1, None)

    def forward_of(self, index: int) -> Callable[..., Any]:
        name = self._flow.blocks[index]
        shape = self._flow.shapes[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = taken(args, kwargs, shape.carrier)
            last, passed = self._passed
            if last != index - 1 or hidden is None or (passed is not None and hidden is not passed):
                raise GptqError(
                    f"{name} is not given what the block before it returned, as it was in the forward without"
                    " data",
                    hint=UNSUPPORTED,
                )
            if index == 0:
                self.hidden.append(hidden)
            written = name in self._flow.written
            self.calls[index].append(
                BlockCall(
                    self._intern(args), self._intern(kwargs), shape.carrier, writes=written, hidden_only=True
                )
            )
            if index == len(self.calls) - 1:
                raise StopForward
            self._passed = (index, hidden)
            return hidden if shape.results is None else (hidden, *[None] * (shape.results - 1))

        return forward
