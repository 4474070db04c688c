"""What the plan counts for sums of leaves, against what `LeafSums` really holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.engine.leaf_sums import LeafSums
from gptq_cli.gptq.hessian import CrossMoment, Hessian
from gptq_cli.gptq.moment import Moment
from gptq_cli.planning.cases import Work
from gptq_cli.planning.leaf_sums import TRIANGLE, leaf_sum_bytes
from gptq_cli.planning.memory import work_sets
from gptq_cli.ranks.group import Ranks
from gptq_cli.ranks.leaves import leaf_count, part_of
from gptq_cli.ranks.team import Alone, Team
from gptq_cli.ranks.tree import most_kept
from gptq_cli.ranks.watch import Watch, Word
from tests.planning.schedules import schedule
from tests.preflight.shapes import llama

K = 512
SQUARE = 4 * K * K
PACKED = [TRIANGLE * SQUARE] * 2 + [SQUARE] * 2
"""Bytes of two H and two cross moments, as they travel."""


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that `work` has allocated at once, as torch's allocator for the CPU tells of it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    found = profile.profiler
    assert found is not None
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def moments() -> list[Moment]:
    return [Hessian(K), Hessian(K), CrossMoment(K), CrossMoment(K)]


def summed(team: Team, parts: list[Moment]) -> None:
    """All leaves of a rank reached, one after the other, and its sums put together."""
    own = part_of(team.leaves, team.rank, team.size)
    sums = LeafSums(team, tuple(own), parts)
    for place in range(len(own)):
        sums.reach(place)
        for part in parts:
            part.tokens += 1
    sums.finish()


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_trees_hold_no_more_than_the_plan_counts(ranks: int) -> None:
    leaves = leaf_count(ranks)
    busiest = max(range(ranks), key=lambda rank: most_kept(part_of(leaves, rank, ranks)))
    parts = moments()
    held = peak_bytes(lambda: summed(Alone(leaves, busiest, ranks), parts))
    counted = leaf_sum_bytes(ranks, PACKED).collecting
    assert 0.6 * counted < held <= counted


def test_exchanging_holds_no_more_than_the_plan_counts(tmp_path: Path) -> None:
    """A process group of one: all that it sends comes back to it."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        team = Ranks(0, 1, torch.device("cpu"), Watch(store, Word(0, "here", 1), 1))
        length = K * K
        value = torch.ones(length)
        nodes = [((0, 16), value)]
        held = peak_bytes(lambda: team.summed(nodes, [[(0, 16)]], length))
    finally:
        dist.destroy_process_group()
    assert SQUARE < held <= leaf_sum_bytes(1, [SQUARE]).exchanging


def test_without_a_launcher_nothing_is_kept() -> None:
    assert leaf_sum_bytes(0, PACKED).collecting == leaf_sum_bytes(0, PACKED).exchanging == 0


@pytest.mark.parametrize("solve_for", ["own", "dense"])
def test_the_plan_of_several_ranks_has_more_room_for_moments(solve_for: str) -> None:
    facts = llama(hidden=1024, inner=4096)
    quantize = QuantizeConfig(solve_for=solve_for)
    data = CalibrationConfig(samples=64, seq_len=2048, batch_size=32)
    needed = {}
    for ranks in (0, 1, 8):
        work = Work(quantize, data, ranks)
        needed[ranks] = work_sets(facts, work, schedule(facts, work, parked=False))[
            "model.layers.3"
        ].hessian_bytes
    assert needed[0] < needed[8] < needed[1]
