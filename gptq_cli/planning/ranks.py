"""What several processes gain over one: the time of each phase, what travels, and how many pay.

Costs of a block are those of costs.py for the busiest rank, once with all the work and once with its share.
Reading the model, starting and writing the checkpoint are not shared. On accelerators each rank is taken to
have one as fast as that which was probed; processes on the cpu share the cores of their machine, so there the
rates are divided by their number. `scripts/bench_ranks.py` measures what travels, and the phases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.costs import BlockCost, block_costs
from gptq_cli.planning.factors import factor_plan
from gptq_cli.planning.rates import RANKS_BYTES_PER_SECOND, MachineRates
from gptq_cli.planning.share import pairs_and_others
from gptq_cli.planning.time import job_seconds
from gptq_cli.planning.traffic import Traffic, block_traffic, busiest
from gptq_cli.ranks.leaves import idle_ranks
from gptq_cli.results.map import PhaseTime, RanksPlan

MIN_GAIN = 0.05
"""A further doubling that gains less than this does not pay."""
PHASES = {
    "samples": "forwards and Hessians",
    "rows": "rows of the solves",
    "factors": "factorisations",
    "columns": "walks over columns",
    "weights": "weights to the device",
    "states": "hidden states to the device",
    "exchange": "between processes",
}
"""Fields of `BlockCost` in words."""
_REST = "reading, start and end"


def ranks_plan(
    facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates | None, ranks: int
) -> RanksPlan:
    """What `ranks` processes gain over one, and up to how many more pay. Without `speed` what travels."""
    work = replace(work, ranks=ranks).on(facts)
    sent, factors = _costliest(facts, work, schedule)
    plan = RanksPlan(
        processes=ranks,
        sum_bytes_per_block=sent.sum_bytes,
        code_bytes_per_block=sent.code_bytes,
        factor_bytes_per_block=factors,
        link_bytes_per_second=RANKS_BYTES_PER_SECOND if speed is None else speed.ranks_rate,
    )
    if speed is None:
        return plan
    alone, together = (_seconds(facts, replace(work, ranks=n), schedule, speed) for n in (1, ranks))
    most, least = 1, sum(alone.values())
    while not idle_ranks(*pairs_and_others(work), 2 * most):  # more than that are refused
        more = sum(_seconds(facts, replace(work, ranks=2 * most), schedule, speed).values())
        if more > (1 - MIN_GAIN) * least:
            break
        most, least = 2 * most, more
    return replace(
        plan,
        seconds=sum(together.values()),
        speed_up=sum(alone.values()) / sum(together.values()),
        phases=tuple(
            PhaseTime(phase=phase, alone_seconds=alone[phase], seconds=seconds)
            for phase, seconds in together.items()
            if seconds or alone[phase]
        ),
        most_that_pay=most,
        assumptions=tuple(_assumptions(facts, work, schedule, speed)),
    )


def _costliest(facts: ModelFacts, work: Work, schedule: Schedule) -> tuple[Traffic, int]:
    """Of the block for which most travels: what the busiest rank sends, and the factors of all ranks."""
    of_blocks = (
        (busiest(of_ranks), sum(rank.factor_bytes for rank in of_ranks))
        for of_ranks in block_traffic(facts, work, schedule).values()
    )
    return max(of_blocks, key=lambda found: found[0].shared_bytes + found[1])


def _seconds(facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates) -> dict[str, float]:
    """Seconds of each phase, by its words."""
    if not _on_accelerators(schedule):
        speed = _shared(speed, work.ranks)
    costs = block_costs(facts, work, schedule, speed).values()
    found = {PHASES[one.name]: sum(getattr(cost, one.name) for cost in costs) for one in fields(BlockCost)}
    found[_REST] = job_seconds(facts, work, schedule, speed) - sum(cost.total for cost in costs)
    return found


def _on_accelerators(schedule: Schedule) -> bool:
    return any(block.execution_device.is_accelerator for block in schedule.blocks)


def _shared(speed: MachineRates, processes: int) -> MachineRates:
    """What one of so many has of the cores of a machine. A walk over columns takes one core as it is."""
    return replace(
        speed,
        forward_rate=speed.forward_rate / processes,
        hessian_rate=speed.hessian_rate / processes,
        matmul_rate=speed.matmul_rate / processes,
        weight_seconds=speed.weight_seconds * processes,
    )


def _assumptions(facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates) -> Iterator[str]:
    """What the times rest on."""
    yield f"rates {speed.source}" if speed.source else "rates from a short probe of this machine"
    if _on_accelerators(schedule):
        yield "each process on an accelerator as fast as that"
    else:
        yield "all processes on this machine, whose cores they share"
    yield f"{speed.ranks_rate / 1e9:g} GB/s from a process to the others"
    yield "every machine reads the files as fast as one process alone"
    yield "no step at the same time as another, but for the block that is read ahead"
    if len(factor_plan(work).senders) > 1:
        yield "the λ that is found best for a step is one that a factor was made for ahead"
    if any(linear.routed for linear in facts.linears):
        yield "every expert is reached by tokens of every process"
