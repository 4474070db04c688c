"""One decoder block: discover its stages, collect their moments, solve, pack.

`open_block` looks at the block with one short sample and makes a frozen `BlockContext`; `quantize_block` does
the work. Passes follow one another: a pass collects one stage (or several side by side), and its linears are
quantized in place before the next one begins, so that later stages see what earlier ones put out.

The schedule is obeyed. Where the traced sample contradicts it, correctness comes first: a block whose
forwards were to be parked, and in which a linear turns out to see a part of the tokens only, is replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import torch_device
from gptq_cli.devices.host_memory import trim_heap
from gptq_cli.engine.capture import PROBE_TOKENS, BlockCall, Captured
from gptq_cli.engine.finite import non_finite_error
from gptq_cli.engine.forwards import Forwards, ParkedForwards, ReplayedForwards, unhooked_copy
from gptq_cli.engine.residuals import find_residuals
from gptq_cli.engine.stages import Stage, collection_passes, find_stages
from gptq_cli.errors import GptqError, NonFinite, NotPositiveDefinite
from gptq_cli.events import LinearQuantized, Observer, SamplesAdvanced, Warned
from gptq_cli.gptq.moments import StageMoments, shrink_to_pooled
from gptq_cli.gptq.packing import PackedTensors, pack
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.model.blocks import assign, weight_matrix
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.model.weights import check_tensor
from gptq_cli.placement.schedule import BlockSchedule
from gptq_cli.results.run import LinearReport

_TRIM_EVERY = 4
"""Micro-batches after which freed heap pages are given back: 10 % off the peak, for milliseconds."""

Store = Callable[[LinearInfo, PackedTensors], None]
"""Takes a finished linear; the tensors are its own to keep."""


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block of the opened model, and how it is to be worked on."""

    schedule: BlockSchedule
    module: nn.Module
    linears: tuple[LinearInfo, ...]
    on_device: Callable[[], AbstractContextManager[object]] = nullcontext
    """A context that has the block on its execution device and takes it back to its storage device."""

    @property
    def name(self) -> str:
        """The dotted name: `model.layers.3`."""
        return self.schedule.name

    @property
    def device(self) -> torch.device:
        """Where it is worked on."""
        return torch_device(self.schedule.execution_device)

    def relative(self, info: LinearInfo) -> str:
        """The name of a linear inside the block: `self_attn.q_proj`."""
        return info.name[len(self.name) + 1 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOptions:
    """What the work on every block of a run has in common."""

    config: QuantizeConfig
    strict: bool
    """End the run rather than fall back to round-to-nearest."""
    store: Store
    observer: Observer


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockContext:
    """What the work on one block needs to know. Names of linears are relative to the block."""

    block: Block
    options: WorkOptions
    infos: Mapping[str, LinearInfo]
    modules: Mapping[str, nn.Module]
    stages: tuple[Stage, ...]
    residuals: Mapping[str, str]
    """Linear -> where the residual is seen that its output is added to, see `engine.residuals`."""

    @property
    def unplanned(self) -> tuple[str, ...]:
        """Linears for which the block has to be replayed although the schedule has it parked."""
        if not self.block.schedule.parked:
            return ()
        return tuple(stage.leader for stage in self.stages if not stage.once)

    @property
    def parked(self) -> bool:
        """Whether forwards are parked between stages."""
        return self.block.schedule.parked and not self.unplanned

    def passes(self) -> list[list[Stage]]:
        """The stages that are collected side by side, pass after pass."""
        return collection_passes(
            self.stages,
            {name: info.in_features for name, info in self.infos.items()},
            true_sequential=self.options.config.true_sequential,
            experts_per_batch=self.block.schedule.experts_per_batch,
        )


@dataclass(frozen=True, slots=True)
class _Pass:
    """Stages that are collected side by side: number `index` (from 0) of `total` passes of the block."""

    stages: Sequence[Stage]
    index: int
    total: int


@dataclass(frozen=True, slots=True)
class _Streams:
    """The samples on their way through the block, and the paired ones through its dense copy."""

    quantized: Forwards
    dense: Forwards | None


def open_block(
    block: Block,
    probe: BlockCall,
    hidden: Tensor,  # (batch, seq_len, hidden_size), of which the first tokens are traced
    options: WorkOptions,
    *,
    paired: bool,
) -> BlockContext:
    """Trace a short sample through the block. `paired`: look for residuals too, for the dense stream."""
    infos = {block.relative(info): info for info in block.linears}
    modules = {name: block.module.get_submodule(name) for name in infos}
    probe, short = probe.to(block.device), hidden[:1, :PROBE_TOKENS].to(block.device)
    stages = find_stages(block.module, modules, probe, short)
    residuals = find_residuals(block.module, modules, stages, probe, short) if paired else {}
    return BlockContext(
        block=block, options=options, infos=infos, modules=modules, stages=stages, residuals=residuals
    )


def quantize_block(
    context: BlockContext,
    calls: list[BlockCall],  # one per micro-batch
    captured: Captured,
) -> tuple[LinearReport, ...]:
    """Quantize the linears of the block in place and hand the packed tensors to the store.

    The hidden states in `captured` are replaced by the outputs of the quantized block. Raises `NonFinite` for
    a weight or an activation that is not finite, `NotPositiveDefinite` for a fallback that `strict` forbids.
    """
    reports: list[LinearReport] = []
    passes = context.passes()
    with ExitStack() as opened:
        streams = _open_streams(context, calls, captured, opened)
        for index, stages in enumerate(passes):
            with ExitStack() as memory:
                moments = _collect(context, streams, _Pass(stages, index, len(passes)), captured, memory)
                if stages[0].once:
                    for stage in stages:
                        moment = moments.pop(stage)
                        reports += _solve(context, stage, moment, moment.hessian())
                    continue
                _warn_undersampled(context, moments)
                hessians = shrink_to_pooled(list(moments.values()))
                for stage in stages:
                    reports += _solve(context, stage, moments.pop(stage), hessians.pop(0))
        captured.hidden[:] = streams.quantized.finish()
        if streams.dense is not None:
            captured.dense[:] = streams.dense.finish()
    return tuple(reports)


def _open_streams(
    context: BlockContext, calls: list[BlockCall], captured: Captured, opened: ExitStack
) -> _Streams:
    """The stream through the block, and where samples are paired the one through a copy that stays dense."""
    dense: Forwards | None = None
    if captured.paired:
        copy = unhooked_copy(context.block.module)
        dense = opened.enter_context(_forwards(context, copy, calls[: captured.paired], captured.dense))
    quantized = opened.enter_context(_forwards(context, context.block.module, calls, captured.hidden))
    return _Streams(quantized, dense)


def _forwards(
    context: BlockContext, module: nn.Module, calls: list[BlockCall], hidden: list[Tensor]
) -> Forwards:
    names = [name for stage in context.stages for name in stage.linears]
    linears = {name: module.get_submodule(name) for name in names}
    words = (module, linears, context.stages, calls, hidden, context.residuals)
    if context.parked:
        return ParkedForwards(*words)
    return ReplayedForwards(*words, device=context.block.device)


def _collect(
    context: BlockContext, streams: _Streams, step: _Pass, captured: Captured, memory: ExitStack
) -> dict[Stage, StageMoments]:
    """The moments of each stage over every micro-batch; the inputs are checked to be finite."""
    paired = streams.dense is not None and all(stage.once for stage in step.stages)
    moments = {
        stage: memory.enter_context(_moments(context, stage, captured.paired_samples, dense=paired))
        for stage in step.stages
    }
    starts = [0, *accumulate(len(batch) for batch in captured.samples)]
    dense_inputs = streams.dense.inputs(step.stages) if streams.dense is not None and paired else None
    for stage, x in streams.quantized.inputs(step.stages):
        place = streams.quantized.place
        batch = captured.samples[place]
        beside = dense_inputs if place < captured.paired else None
        x, x_dense, gap = _inputs(streams, stage, x, beside, len(batch))
        moments[stage].add(x, x_dense, starts[place], gap)
        if not moments[stage].is_finite():
            raise non_finite_error((x, x_dense, gap), batch, context.block.name, stage.leader)
        if stage is step.stages[-1]:
            _advanced(context, step, starts[place + 1], starts[-1])
            if (place + 1) % _TRIM_EVERY == 0:
                _trim(context.block.device)
    if dense_inputs is not None and next(dense_inputs, None) is not None:
        raise GptqError("the dense and the quantized stream of a block do not run in step")
    _trim(context.block.device)
    return moments


def _moments(context: BlockContext, stage: Stage, paired_samples: int, *, dense: bool) -> StageMoments:
    """Empty moments for a stage. `dense`: the paired samples come with their dense copy."""
    weight = weight_matrix(context.modules[stage.leader])
    return StageMoments(
        weight.shape[1],
        context.block.device,
        samples=paired_samples,
        dense=dense,
        weight=weight if stage.leader in context.residuals else None,
    )


def _inputs(
    streams: _Streams,
    stage: Stage,
    x: Tensor,
    dense_inputs: Iterator[tuple[Stage, Tensor]] | None,
    samples: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The input of a stage for one micro-batch, (samples, tokens, K), or (tokens, K) where tokens are routed;
    the same of the dense stream; and what its residual has more than that of the quantized one.
    """
    x_dense = next(dense_inputs)[1] if dense_inputs is not None else None
    residual = streams.quantized.residual(stage)
    dense_residual = streams.dense.residual(stage) if streams.dense and dense_inputs is not None else None
    gap = None if residual is None or dense_residual is None else dense_residual - residual
    if not stage.once:
        return x, x_dense, gap
    # some blocks flatten (batch, seq_len) before a linear; the moments tell samples apart
    return _by_sample(x, samples), _optional(x_dense, samples), _optional(gap, samples)


def _by_sample(x: Tensor, samples: int) -> Tensor:  # (samples, tokens, features)
    return x.reshape(samples, -1, x.shape[-1])


def _optional(x: Tensor | None, samples: int) -> Tensor | None:
    return None if x is None else _by_sample(x, samples)


def _trim(device: torch.device) -> None:
    """Give back what the forwards left between the frames, before anything else needs as much."""
    if device.type == "cpu":
        trim_heap()


def _advanced(context: BlockContext, step: _Pass, done: int, total: int) -> None:
    context.options.observer(
        SamplesAdvanced(block=context.block.name, stage=step.index, stages=step.total, done=done, total=total)
    )


def _warn_undersampled(context: BlockContext, moments: Mapping[Stage, StageMoments]) -> None:
    columns = {stage: context.infos[stage.leader].in_features for stage in moments}
    few = {stage: m.tokens for stage, m in moments.items() if m.tokens < columns[stage]}
    if not few or len(moments) == 1:
        return
    least = min(few, key=lambda stage: few[stage])
    context.options.observer(
        Warned(
            f"{context.block.name}: {len(few)} of {len(moments)} linears saw fewer tokens than they have"
            f" columns ({least.leader}: {few[least]} of {columns[least]});"
            " their Hessians are shrunk towards that of all",
            "more --samples reach more experts",
        )
    )


def _solve(
    context: BlockContext,
    stage: Stage,
    moments: StageMoments,
    hessian: Tensor,  # (K, K)
) -> Iterator[LinearReport]:
    """Quantize the stage's linears in place, hand the packed tensors over, and report."""
    config, infos = context.options.config, context.infos
    started = time.perf_counter()
    weights = [weight_matrix(context.modules[name]) for name in stage.linears]
    for name, weight in zip(stage.linears, weights, strict=True):
        check_tensor(f"{infos[name].name}.weight", weight)
    tokens = moments.tokens
    goals, step = moments.goal(weights, hessian, config.damp_percent)
    moments.free()
    try:
        solved = quantize_linears(weights, hessian, config, goals=goals)
    except NonFinite as error:
        names = ", ".join(infos[name].name for name in stage.linears)
        raise NonFinite(f"{names}: {error.message}", hint=error.hint) from error
    del hessian, goals
    seconds = (time.perf_counter() - started) / len(solved)
    for name in stage.linears:
        quantized = solved.pop(0)
        info = infos[name]
        _check_fallback(context, info, quantized, tokens)
        assign(context.modules[name], quantized.dequantize(weights.pop(0).dtype))
        context.options.store(info, pack(quantized, config.bits, config.checkpoint_format))
        report = LinearReport(
            name=info.name,
            in_features=info.in_features,
            out_features=info.out_features,
            loss=quantized.loss,
            rtn_loss=quantized.rtn_loss,
            damp_percent=quantized.damp_percent,
            attempts=quantized.attempts,
            method=quantized.method,
            alpha=step.alpha,
            target_damp_percent=step.damp_percent,
            tokens=tokens,
            seconds=seconds,
        )
        context.options.observer(LinearQuantized(context.block.name, report))
        yield report


def _check_fallback(context: BlockContext, info: LinearInfo, quantized: QuantizedLinear, tokens: int) -> None:
    """Warn of a linear that was rounded to nearest. Raises `NotPositiveDefinite` where that is forbidden."""
    if quantized.method == "gptq":
        return
    why = (
        "no calibration token reached it"
        if tokens == 0
        else f"its Hessian is not positive definite up to damping {quantized.damp_percent:g}"
        f" ({quantized.attempts} attempts, {tokens} tokens)"
    )
    hint = "calibrate with more or more varied text (--samples, --calibration), or raise --damp-percent"
    if context.options.strict:
        raise NotPositiveDefinite(f"{info.name!r} would fall back to round-to-nearest: {why}", hint=hint)
    context.options.observer(Warned(f"{info.name!r} falls back to round-to-nearest: {why}", hint))
