"""The memory of every rank, with its share; and that of a machine for all of its processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import DeviceBudget, RankPlace, least_of, parse_inventory, places_for
from gptq_cli.placement.schedule import PENDING_BYTES
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import packed_bytes, work_sets
from gptq_cli.planning.rank_plans import host_plans
from gptq_cli.planning.schedule import block_linears, micro_batch_samples
from gptq_cli.planning.share import most_in_a_leaf, own_samples, samples_of_ranks
from gptq_cli.preflight.resolve import Resolution, resolve
from gptq_cli.results.document import to_json
from tests.planning.schedules import schedule
from tests.preflight.shapes import GIB, llama, mixture

FACTS = llama(blocks=4, hidden=2048, inner=8192)
WORK = Work(QuantizeConfig(group_size=128), CalibrationConfig(samples=128, seq_len=2048))


def place(rank: int, host: str, card: int, main: int, processes: int = 2) -> RankPlace:
    budgets = (
        DeviceBudget(Device("cuda", rank % processes), card * GIB, card * GIB),
        DeviceBudget(CPU, main * GIB, main * GIB),
    )
    return RankPlace(rank, host, processes, budgets)


def planned(places: tuple[RankPlace, ...], facts: ModelFacts = FACTS, spec: str = "auto") -> Resolution:
    work = replace(WORK, ranks=len(places))
    return resolve(DeviceMap.parse(spec), facts, least_of(places), work=work, places=places)


def test_the_samples_of_all_ranks_are_those_of_one() -> None:
    for ranks in (1, 2, 3, 5, 16, 24):
        shares = samples_of_ranks(replace(WORK, ranks=ranks))
        assert len(shares) == ranks
        assert sum(share.all for share in shares) == 128
        assert own_samples(replace(WORK, ranks=ranks)).held == max(share.held for share in shares)
        assert own_samples(replace(WORK, ranks=ranks, rank=ranks - 1)) == shares[-1]


def test_a_micro_batch_is_no_longer_than_a_leaf() -> None:
    """Sixteen leaves of 128 samples, of which some are paired and count twice."""
    assert most_in_a_leaf(WORK) == 128
    several = replace(WORK, ranks=4)
    assert most_in_a_leaf(several) <= 10
    assert micro_batch_samples(several, 1 << 20) == most_in_a_leaf(several)
    assert micro_batch_samples(WORK, 1 << 20) == 128


def test_activations_and_solves_are_those_of_a_share() -> None:
    """Counted with the leaf sums left out of sight: a narrow model with much text."""
    facts = llama(blocks=2, hidden=256, inner=512)
    found = {}
    for ranks in (1, 4):
        work = replace(WORK, ranks=ranks)
        needed = work_sets(facts, work, schedule(facts, work, parked=True))["model.layers.0"]
        found[ranks] = needed.activation_bytes
    assert found[4] == pytest.approx(found[1] / 4, rel=0.05)


def test_every_rank_is_planned_on_its_own_device() -> None:
    places = (place(0, "a", 24, 16), place(1, "a", 20, 16), place(2, "b", 24, 60, 1))
    found = planned(places)
    assert [rank.name for rank in found.ranks] == ["rank 0 on a", "rank 1 on a", "rank 2 on b"]
    assert [rank.devices[0].device for rank in found.ranks] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [rank.devices[0].limit_bytes // GIB for rank in found.ranks] == [24, 20, 24]
    common = {plan.device: plan.needed_bytes for plan in found.devices}
    assert all(rank.devices[0].needed_bytes <= common["cuda:0"] for rank in found.ranks)
    told = to_json(found.ranks[1])
    assert isinstance(told, dict)
    assert (told["rank"], told["host"]) == (1, "a"), "an object, not its name"
    hosts = host_plans(found.ranks)
    assert [(one.host, one.processes, one.limit_bytes // GIB) for one in hosts] == [
        ("a", 2, 32),
        ("b", 1, 60),
    ]
    assert hosts[0].needed_bytes == sum(rank.devices[1].needed_bytes for rank in found.ranks[:2])


def test_a_device_that_is_too_small_is_named_with_its_rank_and_machine() -> None:
    places = (place(0, "a", 24, 16), place(1, "a", 24, 16), place(2, "b", 1, 16), place(3, "b", 24, 16))
    (error,) = [f for f in planned(places, spec="rest=0").report.findings if f.level == "error"]
    assert (error.rule, error.subject) == ("memory-budget", "rank 2 on b")
    assert "cuda:0 needs" in error.message
    assert "but may use 1.00 GiB: " in error.message
    assert "as well" not in error.message
    (error,) = [f for f in planned(places).report.findings if f.level == "error"]
    assert error.rule == "no-plan-fits"
    assert "all ranks work by one plan, and the least room is on cuda:0 of rank 2 on b with 1.00 GiB" in (
        error.message
    )
    assert "more accelerators" not in (error.hint or "")


def test_processes_share_the_memory_of_their_machine() -> None:
    """One of them would fit, eight do not: fewer are the remedy."""
    budgets = parse_inventory(",".join([*(f"cuda:{n}=24GiB" for n in range(8)), "cpu=3GiB"]))
    assert planned(places_for(1, budgets)).report.ok
    places = places_for(8, budgets)
    assert [one.processes for one in places] == [8] * 8
    (error,) = [f for f in planned(places).report.findings if f.level == "error"]
    assert "cpu of rank 0 on the machine with 384 MiB free" in error.message
    assert "on each machine instead of 8 (more main memory for each, slower)" in (error.hint or "")


@pytest.mark.parametrize(
    ("ranks", "also"), [(2, "; rank 1 on here lacks room as well"), (4, "; 3 more ranks lack")]
)
def test_other_ranks_that_lack_room_are_counted(ranks: int, also: str) -> None:
    places = places_for(ranks, parse_inventory("cpu=800MiB"), "here")
    (error,) = [f for f in planned(places, spec="cpu").report.findings if f.level == "error"]
    assert error.subject == "rank 0 on here"
    assert f"MiB, its share as one of {ranks} processes there: " in error.message
    assert also in error.message


def test_more_processes_than_accelerators_are_on_several_machines() -> None:
    budgets = parse_inventory("cuda:0=24GiB,cuda:1=24GiB,cpu=60GiB")
    found = places_for(5, budgets)
    assert [(one.host, one.processes) for one in found] == [
        ("machine 1", 2),
        ("machine 1", 2),
        ("machine 2", 2),
        ("machine 2", 2),
        ("machine 3", 1),
    ]
    assert [one.budgets[1].free_bytes // GIB for one in found] == [30, 30, 30, 30, 60]
    on_cpu = places_for(4, parse_inventory("cpu=60GiB"), "here")
    assert [(one.host, one.processes, one.budgets[0].free_bytes // GIB) for one in on_cpu] == [
        ("here", 4, 15)
    ] * 4


def test_where_sums_of_leaves_take_the_room_experts_come_in_smaller_batches() -> None:
    """The engine obeys the schedule: see `collection_passes`."""
    facts = mixture(experts=64, hidden=4096, inner=1024)
    roomy, tight = (planned((place(0, "a", size, 64), place(1, "a", size, 64)), facts) for size in (80, 6))
    usual, smaller = (found.schedule.blocks[0] for found in (roomy, tight) if found.schedule)
    assert smaller.expert_batch_bytes < usual.expert_batch_bytes
    assert smaller.experts_per_batch(4096) < usual.experts_per_batch(4096)
    assert tight.report.ok


def test_larger_batches_of_experts_do_not_depend_on_the_number_of_ranks() -> None:
    """The pool that experts share grows batch by batch: other batches would be other codes."""
    facts = mixture(experts=128, hidden=7168, inner=2048)

    def batch(ranks: int, card: int) -> int:
        schedule = planned(tuple(place(n, "a", card, 64, 8) for n in range(ranks)), facts).schedule
        assert schedule is not None
        return schedule.blocks[0].experts_per_batch(7168)

    assert batch(1, 80) == batch(2, 80) == batch(8, 80) >= 16
    assert 2 <= batch(8, 40) <= 16
    on_cpu = resolve(DeviceMap.parse("cpu"), facts, parse_inventory("cpu=400GiB"), work=WORK)
    assert on_cpu.schedule is not None
    assert on_cpu.schedule.blocks[0].experts_per_batch(7168) == 2


def test_the_first_rank_has_room_for_the_hidden_states_of_all() -> None:
    """It writes them, for a run that is interrupted: two GiB here, of which each holds a quarter on its
    card."""
    first, second, *_ = planned(tuple(place(rank, "a", 24, 16, 4) for rank in range(4))).ranks
    more = first.devices[1].needed_bytes - second.devices[1].needed_bytes
    every = sum(one.held for one in samples_of_ranks(replace(WORK, ranks=4))) * 2048 * 2048 * 2
    assert 0.8 * every < more <= every


def test_the_rank_that_writes_has_packed_tensors_on_their_way_to_the_disk() -> None:
    """All of a block's where they are few, else as many as may be: in main memory, beside the work."""
    places = (place(0, "a", 80, 64), place(1, "a", 80, 64))
    config = WORK.on(FACTS).quantize
    block = sum(packed_bytes(linear, config) for linear in block_linears(FACTS)["model.layers.0"])
    wide = llama(blocks=2, hidden=8192, inner=28672)
    for facts, expected in ((FACTS, block), (wide, PENDING_BYTES)):
        assert expected <= PENDING_BYTES
        assert [rank.devices[1].packing_bytes for rank in planned(places, facts).ranks] == [expected, 0]
