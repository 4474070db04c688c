"""The block loop: GPTQ over a whole model, one decoder block at a time.

For each block, in model order:

    discover its stages from one short sample
    for each stage:                      linears that read the same input
        collect  H = Σ x xᵀ / tokens     over every calibration sample
        aim      at the output of W, or at that of the dense model (`solve_for = "dense"`)
        solve    codes, scales, zeros    one factorisation for all linears of the stage
        assign   W <- dequantized codes  so that what follows sees the quantized block
        pack     and hand over           the codes leave memory here
    run the samples to the end of the block: its outputs are the next block's inputs
    flush the device caches

Nothing is stored on a module. A Hessian lives inside a `with`; the hidden states of the samples are the
only thing that survives a block. Peak memory is one block's work, whatever the model's depth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import flush, read_memory, reset_peak, working_on
from gptq_cli.devices.host_memory import trim_heap
from gptq_cli.devices.leaks import LeakWatch
from gptq_cli.engine.capture import PROBE_TOKENS, BlockCall, Captured
from gptq_cli.engine.finite import non_finite_error
from gptq_cli.engine.forwards import Forwards, ParkedForwards, ReplayedForwards, unhooked_copy
from gptq_cli.engine.residuals import find_residuals
from gptq_cli.engine.stages import Stage, collection_passes, find_stages
from gptq_cli.errors import GptqError, NonFinite, NotPositiveDefinite
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    CacheFlushed,
    DeviceMemory,
    FlushPoint,
    LinearQuantized,
    Observer,
    SamplesAdvanced,
    Warned,
)
from gptq_cli.gptq.moments import StageMoments, shrink_to_pooled
from gptq_cli.gptq.packing import PackedTensors, pack
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.model.blocks import assign, weight_matrix
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.model.weights import check_tensor
from gptq_cli.placement.device import Device
from gptq_cli.results.run import BlockReport, LinearReport

_TRIM_EVERY = 4
"""Micro-batches after which freed heap pages are given back: 10 % off the peak, for milliseconds."""

Store = Callable[[LinearInfo, PackedTensors], None]
"""Takes a finished linear; the tensors are its own to keep."""


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block of the opened model, and what is to be done with it."""

    name: str
    module: nn.Module
    device: torch.device
    """Where it is worked on."""
    linears: tuple[LinearInfo, ...]
    on_device: Callable[[], AbstractContextManager[object]] = nullcontext
    """A context that has the block on `device` and takes it home afterwards."""

    def relative(self, info: LinearInfo) -> str:
        """The name of a linear inside the block: `self_attn.q_proj`."""
        return info.name[len(self.name) + 1 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """How the loop goes about it; nothing here changes what is computed."""

    parked: bool
    """Keep forwards parked between stages (each linear runs once), where the block allows it."""
    strict: bool
    """End the run rather than fall back to round-to-nearest."""
    devices: tuple[Device, ...]
    """Every device in use: watched, flushed, reported."""


def quantize_blocks(
    blocks: Sequence[Block],
    captured: Captured,
    config: QuantizeConfig,
    options: LoopOptions,
    store: Store,
    observer: Observer,
) -> tuple[BlockReport, ...]:
    """Quantize every block in order; `captured` is consumed. Returns one report a block.

    Raises `NonFinite` when a weight or an activation is not finite, `NotPositiveDefinite` when a fallback
    would be needed and `options.strict` forbids it.
    """
    _flush("capture", "", options, observer)
    reports = []
    leaks = LeakWatch()
    for index, block in enumerate(blocks):
        started = time.perf_counter()
        reset_peak(options.devices)
        with working_on(block.device), block.on_device():
            captured.hidden[:] = [hidden.to(block.device) for hidden in captured.hidden]
            captured.dense[:] = [hidden.to(block.device) for hidden in captured.dense]
            calls = [call.to(block.device) for call in captured.calls[index]]
            captured.calls[index] = []
            work = _BlockWork(block, index, len(blocks), config, options, store, observer)
            linears = work.run(calls, captured)
        memory = read_memory(options.devices)
        report = BlockReport(
            name=block.name,
            seconds=time.perf_counter() - started,
            peak_bytes=tuple((entry.device, entry.peak_bytes) for entry in memory),
            linears=linears,
        )
        reports.append(report)
        mean_seconds = sum(done.seconds for done in reports) / len(reports)
        observer(
            BlockFinished(
                index=index,
                total=len(blocks),
                report=report,
                memory=memory,
                remaining_seconds=mean_seconds * (len(blocks) - len(reports)),
            )
        )
        for leak in leaks.check(_flush("block", block.name, options, observer)):
            observer(Warned(leak, "report it with the model's config.json; fewer --samples need less memory"))
    return tuple(reports)


def _flush(
    where: FlushPoint, subject: str, options: LoopOptions, observer: Observer
) -> tuple[DeviceMemory, ...]:
    before, after = flush(options.devices)
    observer(CacheFlushed(where=where, subject=subject, before=before, after=after))
    return after


def _by_sample(x: Tensor | None, samples: int) -> Any:  # (samples, tokens, features)
    return None if x is None else x.reshape(samples, -1, x.shape[-1])


@dataclass(frozen=True, slots=True)
class _BlockWork:
    """One turn of the loop."""

    block: Block
    index: int
    total: int
    config: QuantizeConfig
    options: LoopOptions
    store: Store
    observer: Observer

    def run(self, calls: list[BlockCall], captured: Captured) -> tuple[LinearReport, ...]:
        block = self.block
        infos = {block.relative(info): info for info in block.linears}
        modules = {name: block.module.get_submodule(name) for name in infos}
        probe = captured.probes[self.index].to(block.device)
        stages = find_stages(block.module, modules, probe, captured.hidden[0][:1, :PROBE_TOKENS])
        self.observer(
            BlockStarted(
                name=block.name,
                index=self.index,
                total=self.total,
                device=str(block.device),
                stages=tuple(stage.linears for stage in stages),
            )
        )
        columns = {name: info.in_features for name, info in infos.items()}
        passes = collection_passes(stages, columns, true_sequential=self.config.true_sequential)
        reports: list[LinearReport] = []
        short = captured.hidden[0][:1, :PROBE_TOKENS]
        residuals = find_residuals(block.module, modules, stages, probe, short) if captured.paired else {}
        with ExitStack() as streams:
            dense = self._dense_stream(streams, stages, calls, captured, residuals)
            run = streams.enter_context(
                self._forwards(block.module, stages, calls, captured.hidden, residuals)
            )
            for number, collected in enumerate(passes):
                with ExitStack() as memory:
                    moments = self._collect(
                        run, dense, collected, (number, len(passes)), modules, residuals, captured, memory
                    )
                    if not collected[0].once:
                        self._tell_undersampled(moments, columns)
                        hessians = shrink_to_pooled(list(moments.values()))
                        for stage in collected:
                            solved = self._solve(stage, moments.pop(stage), hessians.pop(0), infos, modules)
                            reports += solved
                        continue
                    for stage in collected:
                        moment = moments.pop(stage)
                        reports += self._solve(stage, moment, moment.hessian(), infos, modules)
            captured.hidden[:] = run.finish()
            if dense is not None:
                captured.dense[:] = dense.finish()
        return tuple(reports)

    def _dense_stream(
        self,
        streams: ExitStack,
        stages: Sequence[Stage],
        calls: list[BlockCall],
        captured: Captured,
        residuals: Mapping[str, str],
    ) -> Forwards | None:
        """The paired samples as the dense model sees them, through a copy of the block that stays dense."""
        if not captured.paired:
            return None
        twin, paired = unhooked_copy(self.block.module), calls[: captured.paired]
        return streams.enter_context(self._forwards(twin, stages, paired, captured.dense, residuals))

    def _forwards(
        self,
        module: nn.Module,
        stages: Sequence[Stage],
        calls: list[BlockCall],
        hidden: list[Tensor],
        residuals: Mapping[str, str],
    ) -> Forwards:
        names = [name for stage in stages for name in stage.linears]
        modules = {name: module.get_submodule(name) for name in names}
        if self.options.parked and self.config.true_sequential and all(stage.once for stage in stages):
            return ParkedForwards(module, modules, stages, calls, hidden, residuals)
        return ReplayedForwards(module, modules, stages, calls, hidden, residuals)

    def _collect(
        self,
        run: Forwards,
        dense: Forwards | None,
        stages: Sequence[Stage],
        position: tuple[int, int],
        modules: dict[str, nn.Module],
        residuals: Mapping[str, str],
        captured: Captured,
        memory: ExitStack,
    ) -> dict[Stage, StageMoments]:
        """The moments of each stage over every micro-batch; the inputs are checked to be finite."""
        paired = dense is not None and all(stage.once for stage in stages)
        moments = {}
        for stage in stages:
            weight = weight_matrix(modules[stage.leader])
            moments[stage] = memory.enter_context(
                StageMoments(
                    weight.shape[1],
                    self.block.device,
                    samples=captured.paired_samples,
                    dense=paired,
                    weight=weight if stage.leader in residuals else None,
                )
            )
        starts = [0, *accumulate(len(batch) for batch in captured.samples)]
        dense_inputs = dense.inputs(stages) if dense is not None and paired else None
        for stage, x in run.inputs(stages):
            place, batch = run.place, captured.samples[run.place]
            is_paired = dense_inputs is not None and place < captured.paired
            x_dense = next(dense_inputs)[1] if dense_inputs is not None and is_paired else None
            residual = run.residual(stage)
            dense_residual = dense.residual(stage) if dense is not None and is_paired else None
            gap = None if residual is None or dense_residual is None else dense_residual - residual
            if stage.once:
                # some blocks flatten (batch, seq_len) before a linear; the moments tell samples apart
                x, x_dense, gap = (_by_sample(tensor, len(batch)) for tensor in (x, x_dense, gap))
            moments[stage].add(x, x_dense, starts[place], gap)
            if not moments[stage].is_finite():
                raise non_finite_error((x, x_dense, gap), batch, self.block.name, stage.leader)
            if stage is stages[-1]:
                self._advanced(position, starts[place + 1], starts[-1])
                if (place + 1) % _TRIM_EVERY == 0:
                    self._trim()
        if dense_inputs is not None and next(dense_inputs, None) is not None:
            raise GptqError("the dense and the quantized stream of a block do not run in step")
        self._trim()
        return moments

    def _trim(self) -> None:
        """Give back what the forwards left between the frames, before anything else needs as much."""
        if self.block.device.type == "cpu":
            trim_heap()

    def _advanced(self, position: tuple[int, int], done: int, total: int) -> None:
        number, stages = position
        self.observer(
            SamplesAdvanced(block=self.block.name, stage=number, stages=stages, done=done, total=total)
        )

    def _tell_undersampled(self, moments: Mapping[Stage, StageMoments], columns: Mapping[str, int]) -> None:
        few = {stage: m.tokens for stage, m in moments.items() if m.tokens < columns[stage.leader]}
        if not few or len(moments) == 1:
            return
        least = min(few, key=lambda stage: few[stage])
        self.observer(
            Warned(
                f"{self.block.name}: {len(few)} of {len(moments)} linears saw fewer tokens than they have"
                f" columns ({least.leader}: {few[least]} of {columns[least.leader]});"
                " their Hessians lean on that of all",
                "more --samples reach more experts",
            )
        )

    def _solve(
        self,
        stage: Stage,
        moments: StageMoments,
        hessian: Tensor,  # (K, K)
        infos: dict[str, LinearInfo],
        modules: dict[str, nn.Module],
    ) -> Iterable[LinearReport]:
        """Quantize the stage's linears in place, hand the packed tensors over, and report."""
        started = time.perf_counter()
        weights = [weight_matrix(modules[name]) for name in stage.linears]
        for name, weight in zip(stage.linears, weights, strict=True):
            check_tensor(f"{infos[name].name}.weight", weight)
        tokens = moments.tokens
        goals, trust = moments.goal(weights, hessian, self.config.damp_percent)
        moments.free()
        try:
            solved = quantize_linears(weights, hessian, self.config, goals=goals)
        except NonFinite as error:
            names = ", ".join(infos[name].name for name in stage.linears)
            raise NonFinite(f"{names}: {error.message}", hint=error.hint) from error
        del hessian, goals
        seconds = (time.perf_counter() - started) / len(solved)
        for name in stage.linears:
            quantized = solved.pop(0)
            info, module = infos[name], modules[name]
            self._announce_fallback(info, quantized, tokens)
            assign(module, quantized.dequantize(weights.pop(0).dtype))
            self.store(info, pack(quantized, self.config.bits, self.config.checkpoint_format))
            report = LinearReport(
                name=info.name,
                in_features=info.in_features,
                out_features=info.out_features,
                loss=quantized.loss,
                rtn_loss=quantized.rtn_loss,
                damp_percent=quantized.damp_percent,
                attempts=quantized.attempts,
                method=quantized.method,
                alpha=trust.alpha,
                target_damp_percent=trust.damp_percent,
                tokens=tokens,
                seconds=seconds,
            )
            self.observer(LinearQuantized(self.block.name, report))
            yield report

    def _announce_fallback(self, info: LinearInfo, quantized: QuantizedLinear, tokens: int) -> None:
        if quantized.method == "gptq":
            return
        why = (
            "no calibration token reached it"
            if tokens == 0
            else f"its Hessian is not positive definite up to damping {quantized.damp_percent:g}"
            f" ({quantized.attempts} attempts, {tokens} tokens)"
        )
        hint = "calibrate with more or more varied text (--samples, --calibration), or raise --damp-percent"
        if self.options.strict:
            raise NotPositiveDefinite(f"{info.name!r} would fall back to round-to-nearest: {why}", hint=hint)
        self.observer(Warned(f"{info.name!r} falls back to round-to-nearest: {why}", hint))
