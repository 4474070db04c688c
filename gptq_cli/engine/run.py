"""From a skeleton to packed tensors: load, capture, quantize block by block, hand each linear over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gptq_cli.devices.accelerators import flush, frozen_gc, reset_peak, torch_device
from gptq_cli.devices.attention import attention_without_plans
from gptq_cli.devices.out_of_memory import clear_frames, is_out_of_memory, out_of_memory_cause
from gptq_cli.engine.capture import Captured, HiddenStates, capture
from gptq_cli.engine.driven import Driven
from gptq_cli.engine.gradient_pass import gradient_samples, gradients_of, take_gradients
from gptq_cli.engine.head import HeadWork, quantize_head
from gptq_cli.engine.keep import Keeper, NothingKept, check_strict
from gptq_cli.engine.loop import quantize_blocks
from gptq_cli.engine.opening import EngineRun, input_device_of, open_stream, opened_blocks
from gptq_cli.engine.tuned import Tuned
from gptq_cli.engine.tuning import CalibrationText, TunedModel, text_of, tune_model
from gptq_cli.engine.work import Block, Store, WorkOptions
from gptq_cli.events import CacheFlushed, Observer, PhaseAdvanced, Warned, phase
from gptq_cli.model.block_stream import BlockStream
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.text_part import language_model
from gptq_cli.placement.device import CPU
from gptq_cli.placement.schedule import Schedule, lighter
from gptq_cli.results.run import BlockReport, LinearReport
from gptq_cli.wording import first_line


@dataclass(frozen=True, slots=True)
class Quantized:
    """What became of every block, and of the head where it was quantized too."""

    blocks: tuple[BlockReport, ...]
    head: LinearReport | None
    tuned: Tuned | None = None
    """What became of tuning; None where none was asked for."""


def quantize_model(
    run: EngineRun,
    input_ids: Tensor,  # (samples, seq_len) int64
    store: Store,
    observer: Observer,
    keeper: Keeper | None = None,
) -> Quantized:
    """Load the model by the placement and quantize it block by block; `store` gets every finished linear.
    `keeper` has the blocks that are finished already, and gets those that will be.

    The model lives and dies in here: when this returns, its memory is free. Raises what
    `quantize_blocks` raises. Where a device runs out of memory at work, it goes on after the last finished
    block with less (`placement.schedule.lighter`), and each step is a warning; but not where several ranks
    work together, which would all have to.
    """
    keeper = keeper or NothingKept()
    check_strict(keeper.finished, strict=run.options.strict)
    tuned = keeper.tuned() if run.config.tune_epochs else None
    untuned = run.config.tune_epochs > 0 and tuned is None
    if len(keeper.finished) == len(run.schedule.blocks) and run.skeleton.head is None and not untuned:
        return Quantized(keeper.finished, None, tuned)
    while True:
        try:
            with attention_without_plans():
                return _attempt(run, input_ids, store, observer, keeper)
        except _MemoryRanOut as error:
            failure = error.__cause__ or error
        less = lighter(run.schedule) if run.options.team.size == 1 else None
        if less is None:
            raise failure
        said = first_line(out_of_memory_cause(failure) or failure)
        clear_frames(failure)
        del failure
        flush(run.options.devices)
        schedule, words = less
        observer(_tried_again(said, words, run.schedule, schedule))
        run = replace(run, schedule=schedule)
        keeper.forget_unfinished()


class _MemoryRanOut(Exception):  # noqa: N818 - it says what happened
    """A device ran out of memory while it worked on the samples; its cause is the error."""


@contextmanager
def _out_of_memory_apart() -> Iterator[None]:
    """Raise a device's out-of-memory error as `_MemoryRanOut`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise _MemoryRanOut from error
        raise


def _tried_again(said: str, words: str, before: Schedule, now: Schedule) -> Warned:
    """A smaller micro-batch than was in use is proposed for the next run; where it is one sample, none."""
    samples, sums = now.micro_batch_samples, ""
    if samples != before.micro_batch_samples:
        sums = "; codes may differ a little, because sums are rounded in another order"
    else:
        samples //= 2
    lower = f"--batch-size {samples} (from the start); or " if samples else ""
    return Warned(
        f"out of memory ({said}): the block is tried again with {words}{sums}",
        f"{lower}give the work more room: gptq quantize … --dry-run says what needs memory",
    )


def _attempt(
    run: EngineRun, input_ids: Tensor, store: Store, observer: Observer, keeper: Keeper
) -> Quantized:
    reset_peak(run.options.devices)  # what an earlier run of this process took is not this one's
    samples = _gone_back_through(run, input_ids, keeper, observer)
    with ExitStack() as opened:
        run.options.team.at("the loading of the model")
        with phase(observer, "load") as words:
            stream = opened.enter_context(open_stream(run, observer))
            model = stream.model
            words.append(f"{run.skeleton.parameters:,} parameters in {dtype_name(run.skeleton.dtype)}")
            if any(run.placement.streams(block) for block in run.skeleton.blocks):
                words.append("each block when its turn comes")
        with _out_of_memory_apart():
            run.options.team.at("the capture of hidden states")
            with phase(observer, "capture", len(input_ids)):
                blocks = opened_blocks(model, run, stream)
                states = _capture(model, blocks, run, stream, input_ids, observer)
                opened.callback(states.close)
                gradients = gradients_of(run, stream, blocks, input_ids, samples) if samples else None
                stream.release()
            with frozen_gc():
                reports = quantize_blocks(
                    blocks, states, run.config, run.options, store, observer, keeper, gradients
                )
                head = _head(model, blocks, run, states, input_ids, store, observer)
            text = _text(run, states, input_ids)
    del model, stream, blocks, states, opened
    before, after = flush(run.options.devices)
    observer(CacheFlushed(where="end", subject="", before=before, after=after))
    return Quantized(reports, head, None if text is None else _tuned(run, text, keeper, observer))


def _gone_back_through(run: EngineRun, ids: Tensor, keeper: Keeper, observer: Observer) -> list[int]:
    """The samples whose gradients are known now; none where they are not asked for, or cannot be had."""
    done = len(keeper.finished) == len(run.schedule.blocks)
    if done or not run.config.fisher_tokens:
        return []
    run.options.team.at("the gradients")
    with _out_of_memory_apart(), frozen_gc():
        taken = take_gradients(run, ids, observer)
    if not taken:
        return []
    keeper.keep_gradients()
    return gradient_samples(run.config, ids)


def _text(run: EngineRun, states: HiddenStates, input_ids: Tensor) -> CalibrationText | None:
    """What tuning compares with: preflight has seen to it that the flow is direct."""
    if not run.config.tune_epochs:
        return None
    assert isinstance(states, Captured)
    return text_of(states, input_ids)


def _tuned(run: EngineRun, text: CalibrationText, keeper: Keeper, observer: Observer) -> Tuned:
    """Tune what is packed, with nothing else of the run in memory, and keep it."""
    reset_peak(run.options.devices)
    with _out_of_memory_apart(), frozen_gc():
        model = TunedModel(run.skeleton, run.placement, run.schedule, run.config, keeper)
        tuned = tune_model(model, text, run.config.tune_epochs, observer)
    del model
    before, after = flush(run.options.devices)
    observer(CacheFlushed(where="end", subject="", before=before, after=after))
    keeper.keep_tuned(tuned)
    return tuned


def _head(
    model: Any,
    blocks: Sequence[Block],
    run: EngineRun,
    states: HiddenStates,
    input_ids: Tensor,
    store: Store,
    observer: Observer,
) -> LinearReport | None:
    """The head, where it is quantized: preflight has seen to it that the flow is direct."""
    if run.skeleton.head is None:
        return None
    assert isinstance(states, Captured)
    run.options.team.at(run.skeleton.head.name)
    main = run.placement.main_device
    states.dense.clear()
    text = language_model(model)
    head = HeadWork(
        model=text,
        module=model.get_submodule(run.skeleton.head.name),
        blocks=blocks,
        flow=run.skeleton.trace.flow,
        info=run.skeleton.head,
        device=torch_device(run.schedule.head_device or main),
        input_device=input_device_of(text, main),
        options=WorkOptions(
            config=run.config,
            strict=run.options.strict,
            store=store,
            observer=observer,
            team=run.options.team,
        ),
    )
    return quantize_head(head, states, input_ids)


def _capture(
    model: Any,
    blocks: Sequence[Block],
    run: EngineRun,
    stream: BlockStream,
    ids: Tensor,
    observer: Observer,
) -> HiddenStates:
    """What enters the blocks; where the flow from block to block is not direct, inside forwards of the model
    that are kept open."""

    def advanced(done: int) -> None:
        observer(PhaseAdvanced("capture", done, len(ids)))

    text = language_model(model)
    modules = [block.module for block in blocks]
    input_device = input_device_of(text, run.placement.main_device)
    flow, batch_size = run.skeleton.trace.flow, run.schedule.micro_batch_samples
    paired = run.config.paired_samples(*ids.shape)
    if not flow.direct:
        driven = Driven(
            text.base_model,
            modules,
            ids,
            flow,
            batch_size=batch_size,
            input_device=input_device,
            paired_samples=paired,
            team=run.options.team,
            between=stream.for_capture,
        )
        try:
            driven.start(advanced)
        except BaseException:
            driven.close()
            raise
        return driven
    with stream.for_capture():
        return capture(
            text.base_model,
            modules,
            ids,
            flow,
            batch_size=batch_size,
            input_device=input_device,
            rest_device=torch_device(CPU) if run.schedule.blocks[0].activations_on_host else None,
            paired_samples=paired,
            advanced=advanced,
            team=run.options.team,
        )
