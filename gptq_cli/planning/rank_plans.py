"""What the devices of every rank must hold, each with its share of the work, and what a machine must for all
of its processes.

All ranks work by one placement and one schedule, made for the largest share on the smallest device. What one
of them needs may be less: it is planned here for each by itself, so that a device that is too small is named
with its rank and machine. Ranks that have equal shares of the samples and equal devices are planned once: of
the rows of a stage, one may have a few more than another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import DeviceBudget, Placement, RankPlace
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import MapCase
from gptq_cli.planning.device_plans import device_plans
from gptq_cli.planning.leaf_sums import leaf_sum_bytes
from gptq_cli.planning.share import own_samples
from gptq_cli.results.map import DevicePlan, HostMemory, RankMemory


def rank_plans(placement: Placement, case: MapCase, schedule: Schedule | None) -> tuple[RankMemory, ...]:
    """The plan of every rank, in order; () where there are not several."""
    if len(case.places) < 2 or case.work is None or schedule is None:
        return ()
    found = []
    known: dict[object, tuple[DevicePlan, ...]] = {}
    for place in case.places:
        work = replace(case.work, rank=place.rank)
        budgets = tuple(_planned_as(budget, case) for budget in place.budgets)
        share = own_samples(work), leaf_sum_bytes(work.ranks, [1.0], place.rank), place.rank == 0, budgets
        if share not in known:
            known[share] = device_plans(placement, replace(case, work=work, budgets=budgets), schedule)
        plans = tuple(_named(plan, place) for plan in known[share])
        found.append(RankMemory(rank=place.rank, host=place.host, devices=plans))
    return tuple(found)


def _planned_as(budget: DeviceBudget, case: MapCase) -> DeviceBudget:
    """With the name that the one plan of all ranks has for it: that of the first rank's."""
    first = case.places[0].device
    return replace(budget, device=first) if budget.device.is_accelerator else budget


def _named(plan: DevicePlan, place: RankPlace) -> DevicePlan:
    """With the name that the rank has for it."""
    return plan if plan.device == str(CPU) else replace(plan, device=str(place.device))


def host_plans(ranks: Iterable[RankMemory]) -> tuple[HostMemory, ...]:
    """The machines, in order, each with the main memory of its processes."""
    of_hosts: dict[str, list[DevicePlan]] = {}
    for rank in ranks:
        of_hosts.setdefault(rank.host, []).extend(plan for plan in rank.devices if plan.device == str(CPU))
    return tuple(
        HostMemory(
            host=host,
            processes=len(plans),
            needed_bytes=sum(plan.needed_bytes for plan in plans),
            limit_bytes=sum(plan.limit_bytes for plan in plans),
        )
        for host, plans in of_hosts.items()
    )
