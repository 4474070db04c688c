"""From a skeleton to packed tensors: load, capture, quantize block by block, hand each linear over."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import flush, frozen_gc, reset_peak, torch_device
from gptq_cli.devices.offload import replace_dispatch_hooks
from gptq_cli.devices.out_of_memory import clear_frames, is_out_of_memory, out_of_memory_cause
from gptq_cli.engine.block import Block, Store
from gptq_cli.engine.capture import Captured, capture
from gptq_cli.engine.keep import Keeper, NothingKept
from gptq_cli.engine.loop import LoopOptions, quantize_blocks
from gptq_cli.events import CacheFlushed, Observer, PhaseAdvanced, Warned, phase
from gptq_cli.model.block_stream import BlockStream
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.weights import check_finite, load_resident
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule, lighter
from gptq_cli.results.run import BlockReport
from gptq_cli.wording import first_line


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """What one run of the engine is given."""

    skeleton: Skeleton
    placement: Placement
    schedule: Schedule
    """How the run is carried out; made for this placement."""
    config: QuantizeConfig
    options: LoopOptions


def quantize_model(
    run: EngineRun,
    input_ids: Tensor,  # (samples, seq_len) int64
    store: Store,
    observer: Observer,
    keeper: Keeper | None = None,
) -> tuple[BlockReport, ...]:
    """Load the model by the placement and quantize it block by block; `store` gets every finished linear.
    `keeper` has the blocks that are finished already, and gets those that will be.

    The model lives and dies in here: when this returns, its memory is free. Raises what
    `quantize_blocks` raises. Where a device runs out of memory at work, it goes on after the last finished
    block with less (`placement.schedule.lighter`), and each step is a warning.
    """
    keeper = keeper or NothingKept()
    if len(keeper.finished) == len(run.schedule.blocks):
        return keeper.finished
    while True:
        try:
            return _attempt(run, input_ids, store, observer, keeper)
        except _MemoryRanOut as error:
            failure = error.__cause__ or error
        less = lighter(run.schedule)
        if less is None:
            raise failure
        said = first_line(out_of_memory_cause(failure) or failure)
        clear_frames(failure)
        del failure
        flush(run.options.devices)
        schedule, words = less
        observer(_tried_again(said, words, changes_sums=schedule.blocks == run.schedule.blocks))
        run = replace(run, schedule=schedule)
        keeper.forget_unfinished()


class _MemoryRanOut(Exception):  # noqa: N818 - it says what happened
    """A device ran out of memory while it worked on the samples; its cause is the error."""


def _tried_again(said: str, words: str, *, changes_sums: bool) -> Warned:
    sums = "; codes may differ a little, because sums are rounded in another order" if changes_sums else ""
    return Warned(
        f"out of memory ({said}): the block is tried again with {words}{sums}",
        "lower --batch-size, or give the work more room: gptq quantize … --dry-run says what needs memory",
    )


def _attempt(
    run: EngineRun, input_ids: Tensor, store: Store, observer: Observer, keeper: Keeper
) -> tuple[BlockReport, ...]:
    reset_peak(run.options.devices)  # what an earlier run of this process took is not this one's
    with ExitStack() as opened:
        with phase(observer, "load") as words:
            model, provider = _open(run, opened)
            words.append(f"{run.skeleton.parameters:,} parameters in {str(run.skeleton.dtype)[6:]}")
            if run.placement.streams_blocks:
                words.append("each block when its turn comes")
            _check_outside(model, run.skeleton.blocks_prefix)
        try:
            with phase(observer, "capture", len(input_ids)):
                blocks = _blocks(model, run, provider)
                with provider.for_capture():
                    captured = _capture(model, blocks, run, input_ids, observer)
            with frozen_gc():
                reports = quantize_blocks(blocks, captured, run.config, run.options, store, observer, keeper)
        except Exception as error:
            if is_out_of_memory(error):
                raise _MemoryRanOut from error
            raise
    del model, provider, blocks, captured
    before, after = flush(run.options.devices)
    observer(CacheFlushed(where="end", subject="", before=before, after=after))
    return reports


class WeightProvider(Protocol):
    """Has the weights of a model, and gives those of a block where and when they are worked on."""

    def on_device(self, block: str) -> AbstractContextManager[None]:
        """A context inside which the block has its weights on the device that works on it."""
        ...

    def for_capture(self) -> AbstractContextManager[None]:
        """A context inside which the model's own forward may run, up to and including its first block."""
        ...


def _open(run: EngineRun, opened: ExitStack) -> tuple[Any, WeightProvider]:
    """The model: block by block on a CPU alone, else resident, dispatched by the placement."""
    if run.placement.streams_blocks:
        stream = opened.enter_context(BlockStream(run.skeleton, torch_device(CPU)))
        return stream.model, stream
    model = load_resident(run.skeleton, run.placement)
    return model, opened.enter_context(replace_dispatch_hooks(model, run.placement))


def _check_outside(model: Any, prefix: str) -> None:
    """Raise `NonFinite` if a tensor outside the blocks is not finite."""
    for name, module in model.named_modules():
        inside = name == prefix or name.startswith(prefix + ".")
        if not inside and not any(True for _ in module.children()):
            check_finite(module, name)


def _blocks(model: Any, run: EngineRun, provider: WeightProvider) -> list[Block]:
    return [
        Block(
            schedule,
            model.get_submodule(schedule.name),
            run.skeleton.linears_of(schedule.name),
            on_device=partial(provider.on_device, schedule.name),
        )
        for schedule in run.schedule.blocks
    ]


def _capture(
    model: Any, blocks: Sequence[Block], run: EngineRun, ids: Tensor, observer: Observer
) -> Captured:
    def advanced(done: int) -> None:
        observer(PhaseAdvanced("capture", done, len(ids)))

    embedding = model.get_input_embeddings().weight.device
    offloaded = run.placement.main_device != CPU and embedding.type == "cpu"
    return capture(
        model.base_model,
        [block.module for block in blocks],
        ids,
        batch_size=run.schedule.micro_batch_samples,
        paired_samples=run.config.paired_samples(len(ids)),
        input_device=torch_device(run.placement.main_device) if offloaded else embedding,
        block_device=blocks[0].device,
        rest_device=torch_device(CPU) if run.schedule.blocks[0].activations_on_host else None,
        advanced=advanced,
    )
