"""Going on after the blocks that an earlier run finished, and keeping those that this one finishes.

What enters the first unfinished block is needed, in both streams. It comes from a snapshot where there is
one, and from there on, or from the embedding on, by running the samples through the finished blocks with the
weights that their codes stand for. Both give what the uninterrupted run had there, to the last bit: the
same forwards of the same weights.

Where it is all kept is not known here: see `jobs.keeping`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import torch_device, working_on
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.engine.calls import BlockCall, moved
from gptq_cli.engine.capture import Captured, HiddenStates
from gptq_cli.engine.linear_report import LOST
from gptq_cli.engine.shared import SharedWeights
from gptq_cli.engine.tuned import Tuned
from gptq_cli.engine.work import Block
from gptq_cli.errors import LinearLost, NotPositiveDefinite
from gptq_cli.events import Observer, PhaseAdvanced, phase
from gptq_cli.gptq.packing import PackedTensors, unpack
from gptq_cli.gptq.quantized import dequantized
from gptq_cli.model.blocks import assign, weight_matrix
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.results.run import BlockReport
from gptq_cli.wording import names_text, number_of


class Keeper(Protocol):
    """Has what earlier runs finished, and keeps what this one finishes."""

    @property
    def finished(self) -> tuple[BlockReport, ...]:
        """The blocks that need not be worked on again: the first ones of the model."""
        ...

    def packed(self, linear: LinearInfo) -> PackedTensors:
        """The tensors of a linear of a finished block."""
        ...

    def restore(self, states: HiddenStates) -> int:
        """Put a snapshot in place of the hidden states; the number of the block that they enter, 0 without
        one."""
        ...

    def keep_gradients(self) -> None:
        """The dense model's gradients are all taken, and need not be taken again."""
        ...

    def keep(self, report: BlockReport, states: HiddenStates) -> None:
        """A block is finished; `states` holds what enters the next one."""
        ...

    def forget_unfinished(self) -> None:
        """A block that was not finished is worked on again: what was stored of it will come again."""
        ...

    def tuned(self) -> Tuned | None:
        """The tuning that an earlier run finished; None where there is none."""
        ...

    def keep_tuned(self, tuned: Tuned) -> None:
        """All blocks are tuned."""
        ...


class NothingKept:
    """A run that starts from the beginning and cannot be continued."""

    finished: tuple[BlockReport, ...] = ()

    def packed(self, linear: LinearInfo) -> PackedTensors:
        """See `Keeper.packed`."""
        raise KeyError(linear.name)

    def restore(self, states: HiddenStates) -> int:
        """See `Keeper.restore`."""
        return 0

    def keep_gradients(self) -> None:
        """See `Keeper.keep_gradients`."""

    def keep(self, report: BlockReport, states: HiddenStates) -> None:
        """See `Keeper.keep`."""

    def forget_unfinished(self) -> None:
        """See `Keeper.forget_unfinished`."""

    def tuned(self) -> Tuned | None:
        """See `Keeper.tuned`."""
        return None

    def keep_tuned(self, tuned: Tuned) -> None:
        """See `Keeper.keep_tuned`."""


def check_strict(finished: Sequence[BlockReport], *, strict: bool) -> None:
    """Raise `NotPositiveDefinite` where `strict` forbids what an earlier start fell back to, and
    `LinearLost` where it forbids what that start lost."""
    linears = [linear for report in finished for linear in report.linears]
    fallen = [linear.name for linear in linears if linear.method != "gptq"]
    lost = [linear.name for linear in linears if linear.loss >= LOST]
    if strict and fallen:
        raise NotPositiveDefinite(
            f"{names_text(map(repr, fallen), 1)} of the finished blocks fell back to round-to-nearest, "
            "before --strict was given",
            hint="--resume never starts over, with more or more varied text (--samples, --calibration)",
        )
    if strict and lost:
        raise LinearLost(
            f"{names_text(map(repr, lost), 1)} of the finished blocks had been lost before --strict "
            "was given",
            hint=f"--resume never --module '{lost[0]}=dense' starts over without quantizing it",
        )


def catch_up(
    blocks: Sequence[Block],
    states: HiddenStates,
    keeper: Keeper,
    config: QuantizeConfig,
    shared: SharedWeights,
    observer: Observer,
) -> int:
    """Bring `states` to what enters the first unfinished block; return that block's number."""
    done = min(len(keeper.finished), len(blocks))
    if not done:
        return 0
    with phase(observer, "resume", done) as words:
        begun = keeper.restore(states)
        for index in range(begun, done):
            observer(PhaseAdvanced("resume", index, done))
            _pass_through(blocks[index], index, states, keeper, config, shared)
        words.append(f"{begun} of {number_of(done, 'block')} from a snapshot, {done - begun} run again")
    return done


def shared_weights(
    blocks: Sequence[Block], keeper: Keeper, config: QuantizeConfig, *, dense: bool
) -> SharedWeights:
    """What several of the blocks share; `dense`: dense copies of blocks will be made."""
    dtypes = {info.name: _dtype(block, name) for block in blocks for name, info in block.shared.items()}

    def finished(info: LinearInfo) -> Tensor:
        return _weights(keeper.packed(info), info, config, dtypes[info.name])

    return SharedWeights(((block.module, block.shared) for block in blocks), finished, dense=dense)


def _dtype(block: Block, linear: str) -> torch.dtype:
    return weight_matrix(block.module.get_submodule(linear)).dtype


def _pass_through(
    block: Block,
    index: int,
    states: HiddenStates,
    keeper: Keeper,
    config: QuantizeConfig,
    shared: SharedWeights,
) -> None:
    """Replace the hidden states by the outputs of a finished block: first those of its dense copy, which is
    what was loaded."""
    rest = torch_device(block.schedule.activation_device)
    with working_on(block.device):
        inputs = states.enter(index, block.device, rest)
    with working_on(block.device), block.on_device(), torch.no_grad():
        shared.make_dense(block.module, block.shared)
        dense = _run(block, inputs.dense_calls, inputs.dense, rest)
        for name, linear in block.own.items():
            weights = _weights(keeper.packed(linear), linear, config, _dtype(block, name))
            assign(block.module.get_submodule(name), weights)
        shared.make_quantized(block.module, block.shared)
        outputs = _run(block, inputs.calls, inputs.hidden, rest)
        states.leave(block.module, inputs, outputs, dense)
        shared.leave(block.module, block.own, block.shared)


def _run(block: Block, calls: Sequence[BlockCall], hidden: list[Tensor], rest: torch.device) -> list[Any]:
    """What the block returns for each micro-batch; `hidden` is consumed."""
    outputs = []
    for call in calls:
        entering = to_device(hidden.pop(0), block.device)
        outputs.append(moved(call.to(block.device)(block.module, entering), rest))
    return outputs


def _weights(packed: PackedTensors, linear: LinearInfo, config: QuantizeConfig, dtype: torch.dtype) -> Tensor:
    """What a finished linear had as its weights while later ones were worked on (N, K)."""
    bits, form = config.of_linear(linear.name).bits, config.checkpoint_format
    codes, zeros = unpack(packed, bits, form, linear.in_features, linear.out_features)
    return dequantized(codes, packed.scales.T, zeros, packed.g_idx, dtype)


def by_sample(states: HiddenStates) -> Iterator[tuple[str, Tensor]] | None:
    """The hidden states sample by sample, as a snapshot names them; None where they do not come so, or live
    inside forwards that are kept open (`engine.driven`).

    Samples, not micro-batches, so that a run with another batch size can go on.
    """
    if not isinstance(states, Captured):
        return None
    streams, batches = _streams(states), states.samples
    if any(
        len(hidden) != len(batch)
        for _, stream in streams
        for hidden, batch in zip(stream, batches, strict=False)
    ):
        return None
    return (
        (f"{name}.{sample}", row)
        for name, stream in streams
        for hidden, batch in zip(stream, batches, strict=False)
        for sample, row in zip(batch, hidden, strict=True)
    )


def _streams(states: Captured) -> tuple[tuple[str, list[Tensor]], ...]:
    """Both, as a snapshot names them; of the dense one the first micro-batches alone."""
    return ("hidden", states.hidden), ("dense", states.dense)


def samples_wanted(states: HiddenStates) -> set[str] | None:
    """The names of the samples that `restore` needs; None where the hidden states cannot be replaced."""
    if not isinstance(states, Captured):
        return None
    return {
        f"{name}.{sample}"
        for name, stream in _streams(states)
        for batch in states.samples[: len(stream)]
        for sample in batch
    }


def restore(states: HiddenStates, stored: Mapping[str, Callable[[], Tensor]], block: int) -> bool:
    """Put stored samples, which enter block number `block`, in place of the hidden states that enter block
    number 0; False where some are missing, which changes nothing."""
    wanted = samples_wanted(states)
    if not isinstance(states, Captured) or wanted is None or not wanted <= set(stored):
        return False
    for name, stream in _streams(states):
        for place, batch in enumerate(states.samples[: len(stream)]):
            device, stream[place] = stream[place].device, stream[place].new_empty(0)
            stream[place] = torch.stack([stored[f"{name}.{sample}"]() for sample in batch]).to(device)
    for index in range(block):
        states.calls[index] = []
    return True
