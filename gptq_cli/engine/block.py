"""One decoder block: discover its stages, collect their moments, solve, pack.

`open_block` looks at the block with one short sample and makes a frozen `BlockContext`; `quantize_block` does
the work. Passes follow one another: a pass collects one stage (or several side by side), and its linears are
quantized in place before the next one begins, so that later stages see what earlier ones put out.

The schedule is obeyed. Where the traced sample contradicts it, correctness comes first: a block whose
forwards were to be parked, and in which a linear turns out to see a part of the tokens only, is replayed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

from torch import Tensor, nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine.calls import BlockCall
from gptq_cli.engine.capture import BlockInputs, HiddenStates
from gptq_cli.engine.experts import ExpertSolver, SolvedStage
from gptq_cli.engine.finite import FiniteNotes, named_error, non_finite_error
from gptq_cli.engine.forwards import Forwards, ParkedForwards, ReplayedForwards, unhooked_copy
from gptq_cli.engine.gradients import output_moments
from gptq_cli.engine.leaf_sums import LeafSums
from gptq_cli.engine.linear_report import check_fallback, check_lost, linear_report
from gptq_cli.engine.residuals import Residual, find_residuals
from gptq_cli.engine.shared_solve import StageShare
from gptq_cli.engine.stage_factors import StageFactors
from gptq_cli.engine.stages import Stage, collection_passes, find_stages
from gptq_cli.engine.streams import TRIM_EVERY, Streams, samples_first, trim_between_frames
from gptq_cli.engine.work import Block, WorkOptions
from gptq_cli.errors import GptqError, NonFinite
from gptq_cli.events import LinearQuantized, SamplesAdvanced
from gptq_cli.gptq.choice import StepChoice
from gptq_cli.gptq.feedback import OutputMoment
from gptq_cli.gptq.moments import StageMoments
from gptq_cli.gptq.packing import pack
from gptq_cli.model.blocks import assign, weight_matrix
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.model.weights import check_tensor
from gptq_cli.placement.names import fold
from gptq_cli.ranks.leaves import Share
from gptq_cli.results.run import LinearReport


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """What the work on one block needs to know. Names of linears are relative to the block."""

    block: Block
    options: WorkOptions
    infos: Mapping[str, LinearInfo]
    modules: Mapping[str, nn.Module]
    stages: tuple[Stage, ...]
    residuals: Mapping[str, Residual]
    """Linear -> what its output is added to, see `engine.residuals`."""

    def configs(self, stage: Stage) -> tuple[QuantizeConfig, ...]:
        """The settings of each linear of the stage."""
        return tuple(self.options.config.of_linear(self.infos[name].name) for name in stage.linears)

    def rows(self, stage: Stage) -> tuple[int, ...]:
        """N of each linear of the stage."""
        return tuple(self.infos[name].out_features for name in stage.linears)

    def family(self, stage: Stage) -> tuple[str, int]:
        """What the stages that are like it have in common: their folded names and K."""
        return fold(stage.leader), self.infos[stage.leader].in_features

    def is_expert(self, stage: Stage) -> bool:
        """True for one of several experts; False for a linear that runs more than once per forward."""
        return not stage.once and self._families[self.family(stage)] > 1

    @cached_property
    def _families(self) -> Counter[tuple[str, int]]:
        return Counter(self.family(stage) for stage in self.stages if not stage.once)

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


def open_block(block: Block, inputs: BlockInputs, options: WorkOptions) -> BlockContext:
    """Trace a short sample through the block, for its stages and its residuals."""
    options.shared.make_dense(block.module, block.shared)
    infos = block.own
    modules = {name: block.module.get_submodule(name) for name in infos}
    probe, short = inputs.probe.to(block.device), inputs.probe_hidden.to(block.device)
    inputs.probe, inputs.probe_hidden = probe, short  # where activations rest on the host, too

    # no closure: its frame would keep the tensors of a traceback alive
    found = partial(_stages_and_residuals, block, modules, probe, short, inputs.probe_tokens)
    stages, residuals = options.team.decided(found)
    residuals = {name: residual.to(block.device) for name, residual in residuals.items()}
    return BlockContext(
        block=block, options=options, infos=infos, modules=modules, stages=stages, residuals=residuals
    )


def _stages_and_residuals(
    block: Block,
    modules: dict[str, nn.Module],
    call: BlockCall,
    hidden: Tensor,  # (1, seq_len, hidden_size)
    tokens: int,
) -> tuple[tuple[Stage, ...], dict[str, Residual]]:
    stages = find_stages(block.module, modules, call, hidden, tokens)
    return stages, find_residuals(block.module, modules, stages, call, hidden)


def quantize_block(
    context: BlockContext, inputs: BlockInputs, states: HiddenStates
) -> tuple[LinearReport, ...]:
    """Quantize the linears of the block in place and hand the packed tensors to the store.

    `inputs` are consumed; what the quantized block returns for them, and its dense copy for the paired ones,
    goes to `states`. Raises `NonFinite` for a weight or an activation that is not finite,
    `NotPositiveDefinite` for a fallback that `strict` forbids.
    """
    reports: list[LinearReport] = []
    passes = context.passes()
    experts = ExpertSolver(
        context.configs,
        context.block.schedule,
        lambda stage: _weights(context, stage),
        context.rows,
        context.options.team,
    )
    known = _outputs(context, inputs)
    with ExitStack() as opened:
        streams = _open_streams(context, inputs, opened)
        for index, stages in enumerate(passes):
            with ExitStack() as memory:
                step = _Pass(stages, index, len(passes))
                moments = _collect(context, streams, step, inputs, experts, memory)
                if stages[0].once:
                    for stage in stages:
                        moment = moments.pop(stage)
                        own = [known.pop(name, None) for name in stage.linears]
                        reports += _solve(context, stage, moment, moment.hessian(), own)
                        del own  # N numbers for each of their outputs
                    continue
                family = context.family(stages[0])
                last = all(context.family(later[0]) != family for later in passes[index + 1 :])
                for solved in experts.solve(moments, last=last):
                    reports += _finish(context, solved, StepChoice())
        outputs = streams.quantized.finish()
        dense = [] if streams.dense is None else streams.dense.finish()
        states.leave(context.block.module, inputs, outputs, dense)
    block = context.block
    context.options.shared.leave(block.module, block.own, block.shared)
    return tuple(reports)


def _outputs(context: BlockContext, inputs: BlockInputs) -> dict[str, OutputMoment]:
    """What the outputs of its linears have to do with the loss, where the dense model's gradients are known;
    the block is still dense."""
    gradients = context.options.gradients
    if gradients is None:
        return {}
    once = [name for stage in context.stages if stage.once for name in stage.linears]
    dense = {
        sample: row
        for batch, hidden in zip(inputs.samples, inputs.dense, strict=False)
        for sample, row in zip(batch, hidden, strict=True)
    }
    return output_moments(
        context.block.module,
        {name: context.modules[name] for name in once},
        {name: context.infos[name].out_features for name in once},
        partial(gradients.of_block, context.block.name, dense),
        context.block.device,
        context.options.observer,
    )


def _open_streams(context: BlockContext, inputs: BlockInputs, opened: ExitStack) -> Streams:
    """The stream through the block, and where samples are paired the one through a copy that stays dense."""
    dense: Forwards | None = None
    if inputs.paired:
        copy = unhooked_copy(context.block.module)
        dense = opened.enter_context(_forwards(context, copy, inputs.dense_calls, inputs.dense))
    context.options.shared.make_quantized(context.block.module, context.block.shared)
    quantized = opened.enter_context(_forwards(context, context.block.module, inputs.calls, inputs.hidden))
    return Streams(quantized, dense)


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
    context: BlockContext,
    streams: Streams,
    step: _Pass,
    inputs: BlockInputs,
    experts: ExpertSolver,
    memory: ExitStack,
) -> dict[Stage, StageMoments]:
    """The moments of each stage over every micro-batch; the inputs are checked to be finite."""
    paired = inputs.share.pairs > 0 and all(stage.once for stage in step.stages)
    moments = {
        stage: memory.enter_context(_moments(context, stage, inputs.share, dense=paired))
        for stage in step.stages
    }
    starts = [0, *accumulate(len(batch) for batch in inputs.samples)]
    dense_inputs = streams.dense.inputs(step.stages) if streams.dense is not None and paired else None
    if step.stages[0].once:
        parts = [part for moment in moments.values() for part in moment.parts]
        sums = LeafSums(context.options.team, inputs.share.leaves, parts)
    else:
        sums = experts.sums(inputs.share.leaves, moments)
    reached, notes = 0, FiniteNotes[tuple[Stage, int]]()
    for stage, x in streams.quantized.inputs(step.stages):
        place = streams.quantized.place
        if place > reached:  # not by the last stage: it may be an expert that no token reaches
            _advanced(context, step, starts[place], starts[-1])
            if place % TRIM_EVERY == 0:
                trim_between_frames(context.block.device)
            reached = place
        sums.reach(place)
        batch = inputs.samples[place]
        beside = dense_inputs if place < inputs.paired else None
        x, x_dense, gap = streams.inputs_of(stage, x, beside, len(batch))
        moments[stage].add(x, x_dense, inputs.share.first_pair + starts[place], gap)
        notes.add((stage, place), moments[stage].finite())
    _advanced(context, step, starts[-1], starts[-1])
    if dense_inputs is not None and next(dense_inputs, None) is not None:
        raise GptqError("the dense and the quantized stream of a block do not run in step")
    bad = notes.first_bad()
    if bad is not None:
        raise _look_again(context, streams, *bad, inputs)
    sums.finish()
    trim_between_frames(context.block.device)
    return moments


def _look_again(
    context: BlockContext, streams: Streams, stage: Stage, place: int, inputs: BlockInputs
) -> NonFinite:
    """The error that says what micro-batch number `place` brought to `stage`."""
    batch = inputs.samples[place]
    paired = streams.dense is not None and stage.once and place < inputs.paired
    seen = streams.quantized.again(stage, place)
    seen += streams.dense.again(stage, place) if paired and streams.dense is not None else []
    if stage.once:
        seen = [samples_first(x, len(batch), stage.batch_dim) for x in seen]
    return non_finite_error(seen, batch, context.block.name, stage.leader)


def _moments(context: BlockContext, stage: Stage, share: Share, *, dense: bool) -> StageMoments:
    """Empty moments for a stage. `dense`: the paired samples come with their dense copy.

    What the output lacks, (N, K), is collected where there is a residual to it, and where that is at most
    half as large as what the input lacks, (K, K): 3 GiB of a 70B's down projection.
    """
    module = context.modules[stage.leader]
    weight, residual = weight_matrix(module), context.residuals.get(stage.leader)
    rows, columns = weight.shape
    narrow = len(stage.linears) == 1 and stage.once and 2 * rows <= columns
    return StageMoments(
        columns,
        context.block.device,
        samples=share.pairs,
        dense=dense,
        weight=weight if narrow or residual is not None else None,
        bias=None if residual is None else getattr(module, "bias", None),
        gain=None if residual is None else residual.gain,
        one_start=share.one_start and stage.once,
    )


def _advanced(context: BlockContext, step: _Pass, done: int, total: int) -> None:
    context.options.observer(
        SamplesAdvanced(block=context.block.name, stage=step.index, stages=step.total, done=done, total=total)
    )


def _solve(
    context: BlockContext,
    stage: Stage,
    moments: StageMoments,
    hessian: Tensor,  # (K, K)
    outputs: Sequence[OutputMoment | None],  # of each linear
) -> Iterator[LinearReport]:
    """Quantize the linears of a stage that runs once in place, hand the packed tensors over, and report."""
    config, infos = context.options.config, context.infos
    started = time.perf_counter()
    weights = _weights(context, stage)
    tokens = moments.tokens
    share = StageShare.of(context.options.team, weights)
    factors = StageFactors(context.options.team, hessian, config)
    goals, step = moments.goal(weights, hessian, config.damp_percent, part=share.part, factors=factors)
    step = share.whole(step)
    moments.free()
    try:
        solved = share.solve(hessian, context.configs(stage), goals, factors.for_solve(), outputs)
    except NonFinite as error:
        for name, weight in zip(stage.linears, weights, strict=True):
            check_tensor(f"{infos[name].name}.weight", weight)  # says where it is not finite
        raise named_error(error, [infos[name].name for name in stage.linears], weights) from error
    del hessian, goals, weights, share, factors, outputs
    seconds = time.perf_counter() - started
    yield from _finish(context, SolvedStage(stage, solved, tokens, 0.0, seconds), step)


def _weights(context: BlockContext, stage: Stage) -> list[Tensor]:  # (N_i, K) each
    """The weights of the stage's linears."""
    return [weight_matrix(context.modules[name]) for name in stage.linears]


def _finish(context: BlockContext, solved: SolvedStage, step: StepChoice) -> Iterator[LinearReport]:
    """Put the solved linears in place, hand the packed tensors over, and report."""
    config, tokens = context.options.config, solved.tokens
    routed = context.is_expert(solved.stage)
    seconds = solved.seconds / len(solved.linears)
    for name, own in zip(solved.stage.linears, context.configs(solved.stage), strict=True):
        quantized = solved.linears.pop(0)
        info, module = context.infos[name], context.modules[name]
        options = context.options
        check_fallback(info, quantized, tokens, options.observer, strict=options.strict)
        check_lost(info, quantized.loss, quantized.scales, options.observer, strict=options.strict)
        assign(module, quantized.dequantize(weight_matrix(module).dtype))
        if options.team.rank == 0:  # one of them writes
            options.store(info, pack(quantized, own.bits, config.checkpoint_format))
        report = linear_report(
            info,
            own,
            quantized,
            tokens=tokens,
            seconds=seconds,
            step=step,
            routed=routed,
            pooled=solved.pooled,
        )
        context.options.observer(LinearQuantized(context.block.name, report))
        yield report
