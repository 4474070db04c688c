"""What a block costs, part by part, at the rates of a machine.

    forward   weights of the block · tokens, for each time a block runs (once parked, more when replayed)
    Hessian   K² · tokens for each stage; experts see the share of the tokens that their router's top-k says
    solve     a · K + b · R · K for each stage (R rows), and its matmuls: MULTIPLY_ADDS · R · K² / rate
              K³ / 6 / rate for each factorisation, of which a step takes some (factors.py)
              a · K once for experts that are solved side by side
    gradients where errors are weighed by them (fisher.py): forwards and A beside the Hessians, A's
              factorisation beside theirs, and a walk over columns for each part of a linear
    travel    on an accelerator the weights once over the link to main memory, and hidden states that rest in
              main memory once for each time the forward runs

Of several ranks the largest share of any counts (share.py): forwards and Hessians of its samples, its rows of
a stage, its experts, and the factorisations that follow one another. Every rank brings the weights to its
device, and walks over the columns, which takes as long for few rows as for many: of experts, as often as it
takes for its own. To that comes what it sends (traffic.py) at the bandwidth between ranks, and the factors
that any rank sends, for which all wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.schedule import BlockSchedule, Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.factors import factor_plan
from gptq_cli.planning.fisher import (
    BLOCK_FORWARDS,
    factor_multiply_adds,
    feedback_multiply_adds,
    gradient_tokens,
    moment_numbers,
    run_weights,
    walks,
)
from gptq_cli.planning.memory import hidden_bytes
from gptq_cli.planning.rates import MachineRates
from gptq_cli.planning.schedule import StageShape, block_stages, expert_families
from gptq_cli.planning.share import own_items, own_rows, samples_share
from gptq_cli.planning.traffic import block_traffic, busiest

MULTIPLY_ADDS = 8
"""Multiply-adds per weight and column, over the solve: feedback, sweeps, losses."""
SHORT_COLUMNS = 256
"""K of the probe: what its solves take beyond columns and weights is in the price of a weight."""


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Seconds of one block, by what they depend on."""

    samples: float
    """Forwards and Hessians: every sample costs the same."""
    rows: float
    """Of the solve: every row of weights costs the same."""
    factors: float
    """Factorising Hessians."""
    columns: float
    """Walking over columns, however few rows there are."""
    weights: float = 0.0
    """On their way to an accelerator."""
    states: float = 0.0
    """Hidden states that rest in main memory, on their way to an accelerator."""
    exchange: float = 0.0
    """Between ranks."""

    @property
    def total(self) -> float:
        """All of them: nothing is taken to happen at the same time."""
        return (
            self.samples
            + self.rows
            + self.factors
            + self.columns
            + self.weights
            + self.states
            + self.exchange
        )


def block_costs(
    facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates
) -> dict[str, BlockCost]:
    """What each block costs at `speed`."""
    traffic = block_traffic(facts, work, schedule)
    known: dict[tuple[tuple[StageShape, ...], BlockSchedule], BlockCost] = {}
    costs = {}
    for name, stages in block_stages(facts).items():
        block = replace(schedule.block(name), name="")
        if (stages, block) not in known:
            known[stages, block] = _block_cost(stages, block, facts, work, speed)
        sent = busiest(traffic[name]).shared_bytes
        sent += sum(rank.factor_bytes for rank in traffic[name])
        costs[name] = replace(known[stages, block], exchange=sent / speed.ranks_rate)
    return costs


def _block_cost(
    stages: Sequence[StageShape],
    block: BlockSchedule,
    facts: ModelFacts,
    work: Work,
    speed: MachineRates,
) -> BlockCost:
    samples = work.calibration.samples
    streams = 1 + work.paired_samples / samples
    tokens = streams * samples * work.calibration.seq_len
    weights_run = _weights_run(stages, block, facts.routed_share)
    squares = sum(stage.in_features**2 * (facts.routed_share if stage.routed else 1.0) for stage in stages)
    forwards = tokens * (weights_run / speed.forward_rate + squares / speed.hessian_rate)
    weighed = gradient_tokens(work)
    backward = BLOCK_FORWARDS * run_weights(stages, facts.routed_share) / speed.forward_rate
    gradients = weighed * (backward + moment_numbers(stages) / speed.hessian_rate)
    rows = factors = 0.0
    for stage, own, factorised in _own_stages(stages, block, work):
        k = stage.in_features
        feedback = MULTIPLY_ADDS * max(0, k - SHORT_COLUMNS) / speed.matmul_rate
        rows += own * k * (speed.weight_seconds + feedback)
        factors += factorised * speed.factor_seconds(k)
        if weighed:
            rows += feedback_multiply_adds(stage) / speed.matmul_rate
            factors += factor_multiply_adds(stage) / (speed.factor_rate or speed.matmul_rate)
    weights, states = _travelled_bytes(facts, work, stages, block, streams)
    share = samples_share(work)
    return BlockCost(
        samples=forwards * share + gradients,
        rows=rows,
        factors=factors,
        columns=speed.column_seconds * _columns_walked(stages, block, work),
        weights=weights / speed.link_rate,
        states=states * share / speed.link_rate,
    )


def _own_stages(
    stages: Sequence[StageShape], block: BlockSchedule, work: Work
) -> list[tuple[StageShape, int, int]]:
    """Stages, and of each kind how many rows one rank solves, and how many factorisations it waits for."""
    in_a_row = factor_plan(work).in_a_row
    found = [(stage, own_rows(work, stage.rows), in_a_row) for stage in stages if not stage.routed]
    for stage, count in expert_families(stages).items():
        own = sum(own_items(work, size) for size in _batches(count, stage, block))
        found.append((stage, own * stage.rows, own))
    return found


def _batches(count: int, stage: StageShape, block: BlockSchedule) -> list[int]:
    """Sizes of the batches in which so many experts are collected."""
    whole, rest = divmod(count, block.experts_per_batch(stage.in_features))
    return [block.experts_per_batch(stage.in_features)] * whole + ([rest] if rest else [])


def _travelled_bytes(
    facts: ModelFacts, work: Work, stages: Sequence[StageShape], block: BlockSchedule, streams: float
) -> tuple[float, float]:
    """Weights, and hidden states, that go from main memory to the device that works on a block, and back."""
    if not block.execution_device.is_accelerator:
        return 0.0, 0.0
    weights = float(facts.dtype_bytes * sum(stage.rows * stage.in_features for stage in stages))
    passes = 2 + sum(not stage.routed for stage in stages)
    return weights, passes * streams * hidden_bytes(facts, work) if block.activations_on_host else 0.0


def _columns_walked(stages: Sequence[StageShape], block: BlockSchedule, work: Work) -> int:
    """Steps of the solver's loop over columns: K for each stage, or for each part that its linears are solved
    in; and K for experts that are solved side by side."""
    weighed = gradient_tokens(work) > 0
    columns = sum((walks(one) if weighed else 1) * one.in_features for one in stages if not one.routed)
    for stage, count in expert_families(stages).items():
        together = block.experts_per_solve(stage.in_features, stage.rows)
        for size in _batches(count, stage, block):
            columns += stage.in_features * -(-own_items(work, size) // together)
    return columns


def _weights_run(stages: Sequence[StageShape], block: BlockSchedule, routed_share: float) -> float:
    """Weights that a token is multiplied with in a block, counted for each time its forward runs.

    Parked forwards run once. Replayed ones run up to each stage, and at last to the end; where stages are
    collected together, in one pass; and for each batch of experts, to the end. Of the experts' weights the
    share counts that a token is routed to.
    """
    weights = [stage.rows * stage.in_features * (routed_share if stage.routed else 1.0) for stage in stages]
    if block.parked:
        return sum(weights)
    once = [weight for stage, weight in zip(stages, weights, strict=True) if not stage.routed]
    if block.replayed == "not-sequential":
        run = sum(weights) if once else 0
    else:
        run = sum(sum(once[:index]) for index in range(len(once)))
    experts = expert_families(stages).items()
    batches = sum(-(-count // block.experts_per_batch(stage.in_features)) for stage, count in experts)
    return run + (batches + 1) * sum(weights)
