"""The block loop: GPTQ over a whole model, one decoder block at a time.

For each block, in model order:

    discover its stages from one short sample
    for each stage:                      linears that read the same input
        collect  H = Σ x xᵀ / tokens     over every calibration sample
        goal     the output of W, or that of the dense model (`solve_for = "dense"`)
        solve    codes, scales, zeros    one factorisation for all linears of the stage
        assign   W <- dequantized codes  so that what follows sees the quantized block
        pack     and hand over           the codes leave memory here
    run the samples to the end of the block: its outputs are the next block's inputs
    keep it                          so that a run that ends here can go on
    announce it, and flush the device caches

The work on one block is `engine.block`; here is the loop around it.

Nothing is stored on a module. A Hessian lives inside a `with`; the hidden states of the samples are the
only thing that survives a block. Peak memory is one block's work, whatever the model's depth.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import flush, read_memory, reset_peak, torch_device, working_on
from gptq_cli.devices.leaks import LeakWatch
from gptq_cli.engine.block import BlockContext, open_block, quantize_block
from gptq_cli.engine.capture import HiddenStates
from gptq_cli.engine.experts import FewTokens
from gptq_cli.engine.gradients import Gradients
from gptq_cli.engine.keep import Keeper, NothingKept, catch_up, shared_weights
from gptq_cli.engine.together import RankReports
from gptq_cli.engine.work import Block, Store, WorkOptions
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    CacheFlushed,
    DeviceMemory,
    FlushPoint,
    Observer,
    Warned,
)
from gptq_cli.placement.device import Device
from gptq_cli.ranks.team import ALONE, Team
from gptq_cli.results.run import BlockReport
from gptq_cli.wording import names_text


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """What the loop does besides its work; nothing here changes what is computed, but for the order of
    sums."""

    strict: bool
    """End the run rather than fall back to round-to-nearest."""
    devices: tuple[Device, ...]
    """Every device in use: watched, flushed, reported."""
    team: Team = ALONE
    """The ranks that work together."""


def quantize_blocks(
    blocks: Sequence[Block],
    states: HiddenStates,
    config: QuantizeConfig,
    options: LoopOptions,
    store: Store,
    observer: Observer,
    keeper: Keeper | None = None,
    gradients: Gradients | None = None,
) -> tuple[BlockReport, ...]:
    """Quantize every block that is not finished, in order; `states` are consumed. Returns one report per
    block, those that `keeper` had among them.

    Raises `NonFinite` when a weight or an activation is not finite, `NotPositiveDefinite` when a fallback
    would be needed and `options.strict` forbids it.
    """
    ranks = RankReports(options.team, observer)
    ranks.tell("", _flush("capture", "", options, observer))
    keeper = keeper or NothingKept()
    shared = shared_weights(blocks, keeper, config, dense=states.paired > 0)
    work = WorkOptions(
        config=config,
        strict=options.strict,
        store=store,
        observer=observer,
        shared=shared,
        gradients=gradients,
        team=options.team,
    )
    first = catch_up(blocks, states, keeper, config, shared, observer)
    reports = list(keeper.finished[:first])
    leaks, few_tokens, unplanned = LeakWatch(), FewTokens(observer), False
    for report in reports:
        few_tokens.block(report.name, report.linears, told=False)
    for index, block in enumerate(blocks[first:], start=first):
        started = time.perf_counter()
        options.team.at(block.name)
        reset_peak(options.devices)
        with working_on(block.device):
            inputs = states.enter(index, block.device, torch_device(block.schedule.activation_device))
        with working_on(block.device), block.on_device():
            context = open_block(block, inputs, work)
            observer(_started(context, index, len(blocks)))
            if context.unplanned and not unplanned:
                observer(_unplanned_warning(context))
                unplanned = True
            linears = quantize_block(context, inputs, states)
            del context, inputs
        memory = read_memory(options.devices)
        report = BlockReport(
            name=block.name,
            seconds=time.perf_counter() - started,
            peak_bytes=tuple((entry.device, entry.peak_bytes) for entry in memory),
            linears=linears,
        )
        reports.append(report)
        few_tokens.block(block.name, linears)
        keeper.keep(report, states)  # before it is announced: who stops the run at that line keeps the block
        observer(_finished(reports, first, len(blocks), memory))
        for leak in leaks.check(_flush("block", block.name, options, observer)):
            observer(Warned(leak, "report it with the model's config.json; fewer --samples need less memory"))
        ranks.tell(block.name, memory)
    few_tokens.end()
    return tuple(reports)


def _started(context: BlockContext, index: int, total: int) -> BlockStarted:
    return BlockStarted(
        name=context.block.name,
        index=index,
        total=total,
        device=str(context.block.device),
        stages=tuple(stage.linears for stage in context.stages),
    )


def _finished(
    reports: Sequence[BlockReport], first: int, total: int, memory: tuple[DeviceMemory, ...]
) -> BlockFinished:
    """`first`: the blocks before it were finished by an earlier run, perhaps on another machine."""
    mean_seconds = sum(done.seconds for done in reports[first:]) / len(reports[first:])
    return BlockFinished(
        index=len(reports) - 1,
        total=total,
        report=reports[-1],
        memory=memory,
        remaining_seconds=mean_seconds * (total - len(reports)),
    )


def _unplanned_warning(context: BlockContext) -> Warned:
    """Said once per run: blocks of one model are alike."""
    found = context.unplanned
    see, run = ("sees", "runs") if len(found) == 1 else ("see", "run")
    return Warned(
        f"{context.block.name}: {names_text(map(repr, found), 1)} {see} a part of the tokens, or {run} more"
        " than once per forward, which was not known when the run was planned: the forwards of such blocks"
        " are replayed, so the run takes longer than planned",
        "report it with the model's config.json",
    )


def _flush(
    where: FlushPoint, subject: str, options: LoopOptions, observer: Observer
) -> tuple[DeviceMemory, ...]:
    before, after = flush(options.devices)
    observer(CacheFlushed(where=where, subject=subject, before=before, after=after))
    return after
