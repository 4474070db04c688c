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

from gptq_cli.devices.deterministic import not_deterministic
from gptq_cli.engine.calls import BlockCall, hidden_of
from gptq_cli.engine.going_back import GoingBack
from gptq_cli.events import Observer, Warned
from gptq_cli.gptq.feedback import OutputMoment
from gptq_cli.wording import names_text


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
        observer(
            Warned(
                f"the gradients of {names_text(bad, 1)} are not finite: rows are solved apart",
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
