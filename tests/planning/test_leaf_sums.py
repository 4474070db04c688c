"""What the plan counts for sums of leaves, against what `LeafSums` really holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.engine.leaf_sums import LeafSums, OwnedSums
from gptq_cli.gptq.hessian import CrossMoment, Hessian
from gptq_cli.gptq.moment import Moment
from gptq_cli.planning.cases import Work
from gptq_cli.planning.leaf_sums import TRIANGLE, expert_sum_bytes, leaf_sum_bytes
from gptq_cli.planning.memory import work_sets
from gptq_cli.ranks.group import Ranks
from gptq_cli.ranks.leaves import leaf_count, part_of
from gptq_cli.ranks.team import Alone, Parcel, Team
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


@contextmanager
def alone_in_a_group(tmp_path: Path) -> Iterator[Ranks]:
    """A process group of one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield Ranks(0, 1, torch.device("cpu"), Watch(store, Word(0, "here", 1), 1))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_trees_hold_no_more_than_the_plan_counts(ranks: int) -> None:
    leaves = leaf_count(ranks)
    busiest = max(range(ranks), key=lambda rank: most_kept(part_of(leaves, rank, ranks)))
    parts = moments()
    held = peak_bytes(lambda: summed(Alone(leaves, busiest, ranks), parts))
    counted = leaf_sum_bytes(ranks, PACKED).collecting
    assert 0.6 * counted < held <= counted


def test_exchanging_holds_no_more_than_the_plan_counts(tmp_path: Path) -> None:
    """All that it sends comes back to it."""
    with alone_in_a_group(tmp_path) as team:
        length = K * K
        value = torch.ones(length)
        nodes = [((0, 16), value)]
        held = peak_bytes(lambda: team.summed(nodes, [[(0, 16)]], length))
    assert SQUARE < held <= leaf_sum_bytes(1, [SQUARE]).exchanging


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_trees_of_experts_hold_no_more_than_the_plan_counts(ranks: int) -> None:
    leaves = leaf_count(ranks)
    busiest = max(range(ranks), key=lambda rank: most_kept(part_of(leaves, rank, ranks)))
    team, parts = Alone(leaves, busiest, ranks), [Hessian(K) for _ in range(4)]
    own = part_of(leaves, busiest, ranks)
    sums = OwnedSums(team, tuple(own), parts, lambda tokens: [None] * 4)

    def work() -> None:
        for place in range(len(own)):
            sums.reach(place)
            for part in parts:
                part.tokens += 1
        sums.finish()

    counted = expert_sum_bytes(ranks, TRIANGLE * SQUARE, 4).collecting
    assert 0.5 * counted < peak_bytes(work) <= counted + SQUARE  # the sum of all, when the others are free


def test_delivering_holds_no_more_than_the_plan_counts(tmp_path: Path) -> None:
    with alone_in_a_group(tmp_path) as team:
        length, there = K * K, [[(0, 16)]]
        parcels = [Parcel([((0, 16), torch.ones(length))], there, 0, place) for place in range(3)]
        sums: list[tuple[int, torch.Tensor]] = []

        def work() -> None:
            for place, whole in team.delivered(parcels, length):
                sums.append((place, whole[:1].clone()))
                del whole

        held = peak_bytes(work)
    assert [(place, float(value)) for place, value in sums] == [(place, 1.0) for place in range(3)]
    assert SQUARE < held + 3 * SQUARE <= expert_sum_bytes(1, SQUARE, 3).exchanging


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
