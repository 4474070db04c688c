"""The dense model's gradients, taken before the work: what every block's output does to the loss.

How a linear's outputs add up in the model's loss (`gptq.feedback`) takes a gradient at each of them, and a
block is worked on long before the end of the model is reached. So the dense model runs once beforehand, on
some of the paired samples, one block in memory at a time:

    embed, then block after block       what enters each is kept
    norm, head                          the gradient of the loss on labels that the model draws
    back through the blocks             run again with gradients, which are kept where what entered was

When a block's turn comes, its linears are dense and the dense stream has what enters it. It runs on these
samples once more, and from the gradient at its output back to those at its linears' outputs: their moments
are summed, and live as long as the block is worked on (`output_moments`). So what is kept for each block are
hidden states of some samples, in 16 bits, and not a matrix for every linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptq_cli.devices.deterministic import deterministic, not_deterministic
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.engine.calls import BlockCall, hidden_of
from gptq_cli.events import Observer, Warned
from gptq_cli.gptq.feedback import OutputMoment


class KeptStates(Protocol):
    """Hidden states of samples, kept outside of memory under the number of a block."""

    @property
    def complete(self) -> bool:
        """Whether an earlier run had come to the end with them."""
        ...

    def write(self, block: int, states: Mapping[int, Tensor]) -> None:
        """Keep those of a block, sample by sample, in the place of what was kept of it."""
        ...

    def read(self, block: int) -> Mapping[int, Callable[[], Tensor]]:
        """Sample -> what was kept, on the CPU. Raises `GptqError` where it cannot be read."""
        ...

    def finish(self) -> None:
        """All blocks have what they will have."""
        ...


@dataclass(slots=True)
class StatesInMemory:
    """Those of a run that keeps nothing."""

    complete: bool = False
    _held: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    def write(self, block: int, states: Mapping[int, Tensor]) -> None:
        """See `KeptStates.write`."""
        self._held[block] = {sample: state.to("cpu", copy=True) for sample, state in states.items()}

    def read(self, block: int) -> Mapping[int, Callable[[], Tensor]]:
        """See `KeptStates.read`."""
        return {sample: partial(_itself, state) for sample, state in self._held[block].items()}

    def finish(self) -> None:
        """See `KeptStates.finish`."""
        self.complete = True


def _itself(state: Tensor) -> Tensor:
    return state


@dataclass(slots=True)
class Gradients:
    """Those of the samples that were gone back through."""

    kept: KeptStates
    batches: Sequence[tuple[int, ...]]
    """Their numbers, in micro-batches."""
    calls: Sequence[list[BlockCall]]
    """`calls[block][micro_batch]`; those of a block are consumed."""
    numbers: Mapping[str, int]
    """The name of a block -> its number."""

    def of_block(self, name: str, dense: Mapping[int, Tensor]) -> Iterator[tuple[BlockCall, Tensor, Tensor]]:
        """How the block is called, what enters it and the gradient at its output, for every micro-batch.
        `dense`: sample -> what enters it in the dense stream (seq_len, hidden_size)."""
        number = self.numbers[name]
        kept = self.kept.read(number)
        for batch, call in zip(self.batches, self.calls[number], strict=True):
            hidden = torch.stack([dense[sample] for sample in batch])
            yield call, hidden, torch.stack([kept[sample]() for sample in batch]).to(hidden.dtype)


class GoingBack:
    """Backward passes through a block: the same every time, where torch can."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._block, self._device = block, device
        self.plain = False
        """A function in it has no kernel that gives the same gradient every time."""

    def __call__(self, run: Callable[[Tensor], Tensor], hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to `hidden`, which enters, from that with respect to what `run` makes of
        it; both on the device afterwards."""
        if not self.plain:
            try:
                return self.strictly(run, hidden, gradient)
            except RuntimeError as error:
                if not not_deterministic(error):
                    raise
            self.plain = True
        return self._pass(run, hidden, gradient)

    def strictly(self, run: Callable[[Tensor], Tensor], hidden: Tensor, gradient: Tensor) -> Tensor:
        """The same; raises a `RuntimeError` of which `not_deterministic` is true where torch cannot."""
        with deterministic(self._device):
            return self._pass(run, hidden, gradient)

    def _pass(self, run: Callable[[Tensor], Tensor], hidden: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad(), _attributes_kept(self._block):
            entering = to_device(hidden, self._device).detach().requires_grad_()
            run(entering).backward(to_device(gradient, self._device))  # type: ignore[no-untyped-call]
        assert entering.grad is not None
        return entering.grad


@contextmanager
def _attributes_kept(block: nn.Module) -> Iterator[None]:
    """Afterwards tensors that modules keep as attributes (states of a recurrence) are what they were: those
    of a forward with gradients would hold on to all of it."""
    before = {module: dict(vars(module)) for module in block.modules()}
    buffers = {module: dict(module._buffers) for module in block.modules()}
    try:
        yield
    finally:
        for module, held in before.items():
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value is not held.get(name):
                    if name in held:
                        vars(module)[name] = held[name]
                    else:
                        del vars(module)[name]
            module._buffers.update(buffers[module])


def run_through(block: nn.Module, call: BlockCall, hidden: Tensor) -> Tensor:
    """What a block hands on, on the device of `hidden`; the call can be used again."""
    return hidden_of(call.to(hidden.device).rehearse(block, hidden))


def output_moments(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    rows: Mapping[str, int],  # N of each
    micro_batches: Callable[[], Iterator[tuple[BlockCall, Tensor, Tensor]]],  # see `Gradients.of_block`
    device: torch.device,
    observer: Observer,
) -> dict[str, OutputMoment]:
    """What the outputs of the block's linears have to do with the loss. The block has its dense weights, each
    of the linears runs once for every token. Those whose gradients are not finite are left out, with a
    warning."""
    back = GoingBack(block, device)
    try:
        moments = _summed(back.strictly, block, linears, rows, micro_batches(), device)
    except RuntimeError as error:
        if not not_deterministic(error):
            raise
        back.plain = True  # from the first micro-batch on: no sum is of two kinds
        moments = _summed(back, block, linears, rows, micro_batches(), device)
    names = list(moments)
    finite = torch.stack([moments[name].finite() for name in names]).tolist() if names else []
    bad = [name for name, fine in zip(names, finite, strict=True) if not fine]
    if bad:
        also = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        observer(
            Warned(
                f"the gradients of {bad[0]}{also} are not finite: rows are solved apart",
                "float16 may overflow: try --dtype bfloat16",
            )
        )
    return {name: moment for name, moment in moments.items() if name not in bad}


def _summed(
    back: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor],
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    rows: Mapping[str, int],
    micro_batches: Iterator[tuple[BlockCall, Tensor, Tensor]],
    device: torch.device,
) -> dict[str, OutputMoment]:
    moments = {name: OutputMoment(count, device) for name, count in rows.items()}
    with _listening(linears, moments):
        for call, hidden, gradient in micro_batches:
            back(partial(run_through, block, call), hidden, gradient)
    return moments


@contextmanager
def _listening(linears: Mapping[str, nn.Module], moments: Mapping[str, OutputMoment]) -> Iterator[None]:
    """Inside the `with`, a backward pass adds the gradients at the outputs of the linears."""

    def hook_of(name: str) -> Callable[..., None]:
        def arrived(gradient: Tensor) -> None:
            moments[name].add(gradient)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(arrived)  # type: ignore[no-untyped-call]

        return hook

    with ExitStack() as stack:
        for name, linear in linears.items():
            if name in moments:
                stack.callback(linear.register_forward_hook(hook_of(name)).remove)
        yield
