"""What fewer bits would cost each set of fused linears: one pass over the dense model, before the work.

A relative loss says how much of a linear's output is lost, not what that does to the model: losses of
different linears cannot be added. Divergences of the model's predictions can, as long as they are small. So
every set of linears is rounded once, alone, and the model says what it costs:

    for each block, in model order:
        H of every stage                        from some samples, as the dense model feeds it
        one pass of GPTQ at 2 bits, some rows   how much more is lost there than at TRIAL_BITS
        the set at TRIAL_BITS, all of it        some windows run through the block with these weights,
        put the dense weights back              and from here on as a stream of their own
        all streams before                      run through the block as it is
    norm and head                               KL(dense ‖ stream) of every stream

So each block is needed once and may be read from the files when its turn comes, like in the work itself; and
S sets of L blocks cost S / 2 forwards of the windows through the model. At other bits than TRIAL_BITS a set
is predicted to diverge in proportion to its loss. Experts of a block are one set, and each kind of them is
solved with the Hessian of all that tokens were routed to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import flush, frozen_gc, torch_device, working_on
from gptq_cli.devices.fp32_matmul import matmul_scope
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.engine.block import BlockContext, open_block
from gptq_cli.engine.calls import BlockCall, hidden_of
from gptq_cli.engine.capture import BlockInputs, Captured, capture
from gptq_cli.engine.forwards import ReplayedForwards
from gptq_cli.engine.opening import EngineRun, input_device_of, open_stream, opened_blocks
from gptq_cli.engine.stages import Stage
from gptq_cli.engine.stand_ins import behind_blocks
from gptq_cli.engine.work import Block, WorkOptions
from gptq_cli.errors import NonFinite
from gptq_cli.evaluation.divergence import mean_divergence
from gptq_cli.events import CacheFlushed, Observer, counted, phase
from gptq_cli.gptq.hessian import Hessian
from gptq_cli.gptq.one_pass import Factored, some_rows
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.model.blocks import assign, weight_matrix
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.model.text_part import language_model
from gptq_cli.placement.device import CPU
from gptq_cli.placement.schedule import HEAD_ROWS
from gptq_cli.results.bits import LOSS_BITS, SAMPLED_ROWS, TRIAL_BITS, BitLosses

Fused = tuple[str, ...]
"""The full names of linears that get the same bits."""


def measure_bit_losses(
    run: EngineRun,
    fused: Sequence[Fused],
    samples: Tensor,  # (count, length) int64: for the Hessians
    windows: Tensor,  # (count, length) int64: for the divergence
    observer: Observer,
) -> dict[Fused, BitLosses]:
    """Measure every set of `fused`: linears of one block, or the head alone.

    The flow of the model is direct, and `run.skeleton.head` is its head, whether it will be quantized or not.
    Raises `NonFinite` for a weight or an output that is not finite.
    """
    with ExitStack() as opened, torch.no_grad():
        with phase(observer, "load"):
            stream = opened.enter_context(open_stream(run, observer))
        model = language_model(stream.model)
        blocks = opened_blocks(stream.model, run, stream)
        with phase(observer, "capture", len(samples) + len(windows)), stream.for_capture():
            on_host = run.schedule.blocks[0].activations_on_host
            captured = partial(
                capture,
                model.base_model,
                [block.module for block in blocks],
                flow=run.skeleton.trace.flow,
                input_device=input_device_of(model, run.placement.main_device),
                rest_device=torch_device(CPU) if on_host else None,
            )
            calibration = captured(samples, batch_size=run.schedule.micro_batch_samples)
            measured = captured(windows, batch_size=len(windows))
        with phase(observer, "bits", len(blocks)), frozen_gc():
            advanced = counted(observer, "bits")
            work = _Measuring(run, fused, calibration, measured, observer)
            for index, block in enumerate(blocks):
                with working_on(block.device), block.on_device():
                    work.block(index, block)
                before, after = flush(run.options.devices)
                observer(CacheFlushed(where="block", subject=block.name, before=before, after=after))
                advanced(index + 1, len(blocks))
            found = work.divergences(model, stream.model, blocks, samples, windows)
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """Linears of a set that share a Hessian and settings, relative to the block."""

    names: tuple[str, ...]
    factored: Factored
    config: QuantizeConfig


class _Measuring:
    """The pass, from block to block."""

    def __init__(
        self,
        run: EngineRun,
        fused: Sequence[Fused],
        calibration: Captured,
        measured: Captured,
        observer: Observer,
    ) -> None:
        self._run = run
        self._calibration, self._measured = calibration, measured
        self._options = WorkOptions(config=run.config, strict=False, store=_nowhere, observer=observer)
        self._fused = fused
        self._streams: dict[Fused, Tensor] = {}
        """The hidden states of the windows with one set rounded."""
        self._losses: dict[Fused, dict[int, float]] = {}

    def block(self, index: int, block: Block) -> None:
        """Round each set of the block in turn; `block` has its weights, and has them again afterwards."""
        rest = torch_device(block.schedule.activation_device)
        inputs = self._calibration.enter(index, block.device, rest)
        windows = self._measured.enter(index, block.device, rest)
        context = open_block(block, inputs, self._options)
        forwards = _forwards(context, inputs)
        parts = self._parts(context, forwards)
        call, hidden = windows.calls[0], windows.hidden[0]
        for fused, stream in self._streams.items():
            self._streams[fused] = _ran(block, call, stream)
        for fused, own in parts.items():
            dense = {
                name: weight_matrix(context.modules[name]).clone() for part in own for name in part.names
            }
            self._losses[fused] = self._rounded(context, own)
            self._streams[fused] = _ran(block, call, hidden)
            for name, weight in dense.items():
                assign(context.modules[name], weight)
        outputs = forwards.finish()
        self._calibration.leave(block.module, inputs, outputs, [])
        self._measured.leave(block.module, windows, [call(block.module, to_device(hidden, block.device))], [])

    def _parts(self, context: BlockContext, forwards: ReplayedForwards) -> dict[Fused, list[_Part]]:
        """The sets of the block, with a factor for each stage and for each kind of experts."""
        set_of = {name: fused for fused in self._fused for name in fused}
        full = {name: info.name for name, info in context.infos.items()}
        sharing: dict[object, list[str]] = {}
        for stage in context.stages:
            sharing.setdefault(_reads(context, stage), []).extend(stage.linears)
        found: dict[Fused, list[_Part]] = {}
        with ExitStack() as memory:
            moments = {
                key: memory.enter_context(Hessian(context.infos[names[0]].in_features, context.block.device))
                for key, names in sharing.items()
            }
            for stage, x in forwards.inputs(context.stages):
                moments[_reads(context, stage)].add(x)
            for key, names in sharing.items():
                config = self._options.config.of_linear(full[names[0]])
                factored = _factored(moments.pop(key), config, [full[name] for name in names])
                alike: dict[tuple[Fused, QuantizeConfig], list[str]] = {}
                for name in names:
                    own = replace(self._options.config.of_linear(full[name]), bits=TRIAL_BITS)
                    if full[name] in set_of:
                        alike.setdefault((set_of[full[name]], own), []).append(name)
                for (fused, own), held in alike.items():
                    found.setdefault(fused, []).append(_Part(tuple(held), factored, own))
        return {fused: found[fused] for fused in self._fused if fused in found}

    def _rounded(self, context: BlockContext, parts: Sequence[_Part]) -> dict[int, float]:
        """Round the linears of a set in place; their mean loss at every number of bits."""
        lost = dict.fromkeys(LOSS_BITS, 0.0)
        for part in parts:
            try:
                for bits, loss in self._part_rounded(context, part).items():
                    lost[bits] += loss / len(parts)
            except NonFinite as error:
                first = context.infos[part.names[0]].name
                raise NonFinite(f"{first}: {error.message}", hint=error.hint) from error
        return lost

    def _part_rounded(self, context: BlockContext, part: _Part) -> dict[int, float]:
        rows = max(1, SAMPLED_ROWS // len(part.names))
        some: list[tuple[Tensor, Tensor]] = []
        for names in _batches(part.names, context):
            weights = [weight_matrix(context.modules[name]).float() for name in names]
            errors = torch.split(
                part.factored.error(weights, part.config), [len(weight) for weight in weights]
            )
            for name, weight, error in zip(names, weights, errors, strict=True):
                assign(context.modules[name], weight - error)
                if len(some) < SAMPLED_ROWS:
                    some.append((some_rows(weight, rows), some_rows(error, rows)))
        return _losses(part.factored, part.config, some)

    def divergences(
        self, text: Any, model: Any, blocks: Sequence[Block], samples: Tensor, windows: Tensor
    ) -> dict[Fused, BitLosses]:
        """When all blocks are done: how far every stream's predictions are from the dense model's."""
        head = self._run.skeleton.head
        assert head is not None
        ends = partial(_end_of_model, text, model.get_submodule(head.name), blocks, self._run)
        _, dense = ends(self._measured.hidden[0], windows)
        found = {}
        for fused, stream in self._streams.items():
            _, logits = ends(stream, windows)
            found[fused] = _bit_losses(fused, mean_divergence(dense, logits), self._losses[fused])
        if (head.name,) in self._fused:
            found[head.name,] = self._head(head, model.get_submodule(head.name), ends, samples, windows)
        return {fused: found[fused] for fused in self._fused if fused in found}

    def _head(
        self, info: LinearInfo, module: nn.Module, ends: Any, samples: Tensor, windows: Tensor
    ) -> BitLosses:
        """The head itself, rounded some rows at a time: its error is added to the logits."""
        config = replace(self._options.config.of_linear(info.name), bits=TRIAL_BITS)
        weight, device = weight_matrix(module), self._measured.hidden[0].device
        with Hessian(info.in_features, device) as moment:
            for batch, hidden in zip(self._calibration.samples, self._calibration.hidden, strict=True):
                moment.add(ends(hidden, samples[list(batch)])[0])
            factored = _factored(moment, config, [info.name])
        _, dense = ends(self._measured.hidden[0], windows)
        some: list[tuple[Tensor, Tensor]] = []
        pieces = torch.split(weight, HEAD_ROWS)
        for rows in pieces:
            dense_rows = rows.to(device).float()
            error = factored.error([dense_rows], config)
            each = max(1, SAMPLED_ROWS // len(pieces))
            some.append((some_rows(dense_rows, each), some_rows(error, each)))
            rows.copy_(dense_rows - error)
        losses = _losses(factored, config, some)
        _, logits = ends(self._measured.hidden[0], windows)
        return _bit_losses((info.name,), mean_divergence(dense, logits), losses)


def _losses(
    factored: Factored,
    config: QuantizeConfig,
    some: Sequence[tuple[Tensor, Tensor]],  # (n, K), (n, K): rows of weights, and their errors at TRIAL_BITS
) -> dict[int, float]:
    """Bits -> the relative loss of linears that share a Hessian, on some of their rows."""
    weights = [rows for rows, _ in some]
    errors = {bits: factored.error(weights, replace(config, bits=bits)) for bits in LOSS_BITS[:-1]}
    errors[TRIAL_BITS] = torch.cat([error for _, error in some])
    return {bits: factored.loss(error, weights) for bits, error in errors.items()}


def _reads(context: BlockContext, stage: Stage) -> object:
    """Equal for stages that share a Hessian: experts of a kind do."""
    return stage if stage.once else context.family(stage)


def _forwards(context: BlockContext, inputs: BlockInputs) -> ReplayedForwards:
    block = context.block
    linears = dict(context.modules)
    return ReplayedForwards(
        block.module, linears, context.stages, inputs.calls, inputs.hidden, device=block.device
    )


def _ran(block: Block, call: BlockCall, hidden: Tensor) -> Tensor:
    """What the block makes of the hidden states of all windows; they rest where they rested before."""
    with torch.no_grad():
        return hidden_of(call.rehearse(block.module, to_device(hidden, block.device))).to(hidden.device)


def _batches(names: Sequence[str], context: BlockContext) -> Iterator[list[str]]:
    """Linears that are rounded side by side: all of a stage, or as many experts as the schedule says."""
    most, batch, rows = context.block.schedule.solve_batch_rows, list[str](), 0
    for name in names:
        own = context.infos[name].out_features
        if batch and rows + own > most:
            yield batch
            batch, rows = [], 0
        batch.append(name)
        rows += own
    yield batch


def _factored(moment: Hessian, config: QuantizeConfig, names: Sequence[str]) -> Factored:
    if not bool(moment.finite()):
        raise NonFinite(
            f"what enters {names[0]} is not finite", hint="an activation overflowed: try --dtype bfloat16"
        )
    return Factored.of(moment.matrix(), config)


def _bit_losses(fused: Fused, kl: float, losses: Mapping[int, float]) -> BitLosses:
    if not math.isfinite(kl):
        raise NonFinite(
            f"the model's output is not finite with {fused[0]} at {TRIAL_BITS} bits",
            hint="float16 may overflow: try --dtype bfloat16",
        )
    return BitLosses(kl=max(kl, 0.0), losses=losses)


def _end_of_model(
    text: Any,
    head: nn.Module,
    blocks: Sequence[Block],
    run: EngineRun,
    hidden: Tensor,  # (count, length, hidden_size): what the last block put out
    ids: Tensor,  # (count, length) int64
) -> tuple[Tensor, Tensor]:  # (count, length, K), (count · length, V)
    """What enters the head, and the logits."""
    flow, caught = run.skeleton.trace.flow, list[Tensor]()
    device = input_device_of(text, run.placement.main_device)
    with ExitStack() as stack:
        given = to_device(hidden, blocks[-1].device)
        stack.enter_context(behind_blocks([block.module for block in blocks], flow, given))
        handle = head.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        stack.callback(handle.remove)
        stack.enter_context(working_on(device))
        stack.enter_context(matmul_scope(hidden.dtype, blocks[-1].device))
        logits = text(input_ids=ids.to(device), use_cache=False).logits
    return caught[0], logits.flatten(0, -2)


def _nowhere(linear: LinearInfo, packed: PackedTensors) -> None:
    """The store of a pass that packs nothing."""
