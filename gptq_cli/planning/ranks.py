"""What several processes gain: a small model of what is shared, what is not, and the traffic.

    samples    forwards and Hessians: the largest share of a rank, ceil(leaves / ranks) of the leaves
    rows       of the solve: divided by the number of ranks
    factors    every rank factorises H of a stage for itself; those of experts are dealt out
    columns    the walk over columns takes as long for few rows as for many; that of experts is dealt out
    traffic    bytes that leave a rank, at the bandwidth of its link

Of the sums a rank sends `sum_bytes`: a part of the lower block triangle of H to each other rank, and the sum
of its own part to all; with a dense stream two Hessians and two cross moments. Of the solve it sends its rows
as one byte a code, with scales and zeros (`code_bytes`). `scripts/bench_ranks.py` measures both.

Reading the model and writing the checkpoint are not shared. All else is taken from the estimate for one
process (`time.py`), which a probe of this machine makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.leaf_sums import TRIANGLE
from gptq_cli.planning.schedule import StageShape, block_stages
from gptq_cli.planning.time import BlockCost, MachineRates, block_costs, job_seconds
from gptq_cli.ranks.leaves import leaf_count
from gptq_cli.results.map import RanksPlan

LINK_BYTES_PER_SECOND = 20e9
"""Of a rank to the others: what PCIe 4.0 gives; NVLink gives ten times as much, 100 Gb/s Ethernet half."""
MIN_GAIN = 0.05
"""A further doubling that gains less than this does not pay."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that leave one rank while a block is worked on."""

    sum_bytes: float
    code_bytes: float

    @property
    def total(self) -> float:
        """Both."""
        return self.sum_bytes + self.code_bytes


def block_traffic(stages: tuple[StageShape, ...], work: Work, ranks: int) -> Traffic:
    """What a rank sends for a block of these stages; `ranks` a power of two, so that each has one node."""
    dense = work.quantize.solve_for == "dense"
    sums = codes = 0.0
    for stage in stages:
        k = stage.in_features
        square = k * k
        numbers = TRIANGLE * square
        if dense and not stage.routed:
            numbers = 2 * TRIANGLE * square + 2 * square
        sums += 4 * numbers * 2 * (ranks - 1) / ranks
        groups = -(-k // max(1, work.quantize.group_columns)) if work.quantize.group_columns > 0 else 1
        codes += stage.rows * (k + 3 * groups) * (ranks - 1) / ranks
    return Traffic(sums, codes)


def seconds_of_block(cost: BlockCost, traffic: Traffic, stages: tuple[StageShape, ...], ranks: int) -> float:
    """Of one block, by so many ranks."""
    leaves = leaf_count(ranks)
    share = -(-leaves // ranks) / leaves
    routed = sum(stage.in_features**3 for stage in stages if stage.routed)
    dealt = routed / (sum(stage.in_features**3 for stage in stages) or 1)
    alone = (1 - dealt) + dealt / ranks
    shared = cost.samples * share + cost.rows / ranks + (cost.factors + cost.columns) * alone
    return shared + (traffic.total / LINK_BYTES_PER_SECOND if ranks > 1 else 0.0)


def ranks_plan(
    facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates, ranks: int
) -> RanksPlan:
    """What `ranks` processes gain over one, and up to how many more pay."""
    work = work.on(facts)
    stages = block_stages(facts)
    costs = block_costs(facts, work, schedule, speed)
    fixed = job_seconds(facts, work, schedule, speed) - sum(cost.total for cost in costs.values())

    def seconds(count: int) -> float:
        return fixed + _blocks_seconds(costs, stages, work, count)

    alone, together = seconds(1), seconds(ranks)
    most = 1
    while most < work.calibration.samples and seconds(2 * most) < (1 - MIN_GAIN) * seconds(most):
        most *= 2
    return RanksPlan(
        processes=ranks,
        seconds=together,
        speed_up=alone / together,
        bytes_per_block=int(max(block_traffic(one, work, ranks).total for one in stages.values())),
        most_that_pay=most,
        link_bytes_per_second=LINK_BYTES_PER_SECOND,
    )


def _blocks_seconds(
    costs: Mapping[str, BlockCost], stages: Mapping[str, tuple[StageShape, ...]], work: Work, ranks: int
) -> float:
    return sum(
        seconds_of_block(cost, block_traffic(stages[name], work, ranks), stages[name], ranks)
        for name, cost in costs.items()
    )
