"""What it takes to measure what fewer bits cost (`engine.bit_losses`): tokens, memory, time.

With T tokens of windows and S sets of linears, of which each block has its share:

    forwards   a stream for every set of the blocks before, and of the block itself: S / 2 forwards of the
               windows through the model, and S through its head
    Hessians   those of a block side by side, of some samples
    solves     one pass over all rows, and one over SAMPLED_ROWS of each stage
    memory     the hidden states of S + 1 streams, a copy of the largest set while it is rounded, the logits
               of the windows; and what lies outside the blocks, the head too, stays

The schedule is that of the work: where blocks are worked on, and how much of the samples at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import SOLVE_BYTES, Schedule
from gptq_cli.planning.cases import DeviceNeed
from gptq_cli.planning.costs import MULTIPLY_ADDS
from gptq_cli.planning.device_plans import weights_on
from gptq_cli.planning.memory import CHUNK_BYTES, IN_FLIGHT_HIDDEN, IN_FLIGHT_ROWS, MIB
from gptq_cli.planning.rates import MachineRates
from gptq_cli.planning.schedule import StageShape, block_linears, block_stages
from gptq_cli.results.bits import LOSS_BITS, SAMPLED_ROWS
from gptq_cli.results.map import DevicePlan

HESSIAN_TOKENS = 8192
"""That Hessians are made of: enough to tell how the loss falls with the bits."""
WINDOW_TOKENS = 128
MEASURED_TOKENS = 256
"""On which the divergence is measured: between two halves of twice as many, SmolLM2's differed by a fifth."""
LOGIT_BYTES = 192 * MIB
"""Of log-probabilities in float32, some rows at a time: two distributions and what is made of them."""


def hessian_samples(samples: int, seq_len: int) -> int:
    """So many of the calibration samples: half of them at most, so that others are left to measure on."""
    return max(1, min(samples // 2, -(-HESSIAN_TOKENS // seq_len)))


def measured_windows(samples: int, seq_len: int) -> tuple[int, int]:
    """(count, length) of the windows that are cut from `samples` others."""
    length = min(seq_len, WINDOW_TOKENS)
    return min(samples, max(1, MEASURED_TOKENS // length)), length


def tokens_of(samples: int, seq_len: int) -> tuple[int, int]:
    """Tokens of the samples for Hessians, and of the windows."""
    used = hessian_samples(samples, seq_len)
    count, length = measured_windows(max(1, samples - used), seq_len)
    return used * seq_len, count * length


def measuring_needs(
    facts: ModelFacts,
    placement: Placement,
    schedule: Schedule,
    plans: Sequence[DevicePlan],
    tokens: tuple[int, int],
) -> tuple[DeviceNeed, ...]:
    """What each device holds at the highest moment. `facts`: with the head; `tokens`: see `tokens_of`."""
    weights = weights_on(placement, facts)
    sets = {linear.fused_with for linear in facts.linears}
    hidden = facts.hidden_size * facts.dtype_bytes
    streams = (sum(tokens) + len(sets) * tokens[1]) * hidden
    logits = 2 * tokens[1] * facts.vocab_size * facts.dtype_bytes + LOGIT_BYTES
    needs = []
    for plan in plans:
        held = weights[next(device for device in weights if str(device) == plan.device)]
        rests = held.streamed + held.blocks + held.outside + held.moved_block + held.moved_module
        on_it = [b for b in schedule.blocks if str(b.execution_device) == plan.device]
        rounding = max((_rounding_bytes(facts, block.name, schedule) for block in on_it), default=0)
        resting = any(str(block.activation_device) == plan.device for block in schedule.blocks)
        ends = logits if plan.device == str(placement.main_device) else 0
        needed = rests + max(rounding + plan.ahead_bytes, ends) + (streams if resting else 0)
        needs.append(DeviceNeed(plan.device, needed + plan.baseline_bytes, plan.limit_bytes))
    return tuple(needs)


def _rounding_bytes(facts: ModelFacts, block: str, schedule: Schedule) -> int:
    """Hessians, factors, weights that are solved, and their copies, of one block; 0 where all of it stays
    dense."""
    stages = block_stages(facts)[block]
    if not stages:
        return 0
    b, t = facts.dtype_bytes, schedule.micro_batch_tokens
    most_rows = schedule.block(block).solve_batch_rows
    squares = sum(4 * stage.in_features**2 for stage in _sharing(stages))
    flight = t * b * (IN_FLIGHT_HIDDEN * facts.hidden_size + IN_FLIGHT_ROWS * max(s.rows for s in stages))
    widest = max(stage.in_features for stage in stages)
    solving = max(
        SOLVE_BYTES * (max(stage.rows, most_rows) if stage.routed else stage.rows) * stage.in_features
        for stage in stages
    )
    sets: dict[tuple[str, str], int] = {}
    for linear in block_linears(facts)[block]:
        sets[linear.fused_with] = (
            sets.get(linear.fused_with, 0) + b * linear.in_features * linear.out_features
        )
    collect = squares + flight + min(CHUNK_BYTES, 4 * t * widest)
    return max(collect, 2 * squares + solving + max(sets.values()))


def _sharing(stages: Sequence[StageShape]) -> list[StageShape]:
    """One for each Hessian: experts of a kind share theirs."""
    once = [stage for stage in stages if not stage.routed]
    return [*once, *{stage.family: stage for stage in stages if stage.routed}.values()]


def measuring_seconds(
    facts: ModelFacts, speed: MachineRates, tokens: tuple[int, int], head: LinearFact | None
) -> float:
    """An estimate of how long it takes at `speed`. `tokens`: see `tokens_of`."""
    calibration, windows = tokens
    seconds, streams = 0.0, 0
    linears = block_linears(facts)
    for block, stages in block_stages(facts).items():
        if not stages:
            continue
        streams += len({linear.fused_with for linear in linears[block]})
        share = [facts.routed_share if stage.routed else 1.0 for stage in stages]
        run = sum(s.rows * s.in_features * part for s, part in zip(stages, share, strict=True))
        seconds += run * (2 * calibration + (streams + 1) * windows) / speed.forward_rate
        for stage, part in zip(stages, share, strict=True):
            k = stage.in_features
            seconds += part * calibration * k**2 / speed.hessian_rate
            rows = (
                stage.rows
                * (1 + MULTIPLY_ADDS * k / speed.matmul_rate / max(speed.weight_seconds, 1e-12))
                / 2
            )
            seconds += speed.weight_seconds * k * rows
        for stage in _sharing(stages):
            k = stage.in_features
            seconds += k**3 / speed.matmul_rate + len(LOSS_BITS) * speed.column_seconds * k
            seconds += SAMPLED_ROWS * k * (speed.weight_seconds + 2 * k / speed.matmul_rate)
    if head is not None:
        size = head.in_features * head.out_features
        seconds += (streams + 1) * windows * size / speed.forward_rate
    return seconds
