"""Our own plans for `auto`, `balanced`, `balanced_low_0` and `sequential`.

Transformers' `auto` fills the cards with weights and leaves nothing for Hessians and activations, which is
the most reported way to run out of memory with a device map. Here each device that works on blocks keeps
its work set (see memory.py) free, and `auto` takes the first of these steps that fits:

    1  everything on one accelerator, the one with most room
    2  everything on several accelerators, as few as possible, evenly filled
    3  the blocks on accelerators, embeddings or head on cpu
    4  the last blocks on cpu as well, as few as possible
    5  refusal; preflight names the cheapest remedies

A step is a function from a problem to placements, so that another one (weights streamed block by block from
the checkpoint) is another line in `STEPS`. Each step is tried with parked forwards first, which are faster,
then with replayed ones, which hold less, and only then without the last 5 % of every device kept free. What
decides whether a plan fits is `device_plans`, never the search itself. The search plans for the smallest
micro-batch; `with_wide_micro_batch` makes it larger afterwards, where the plan leaves room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device, format_size
from gptq_cli.placement.placement import Placement, PlacementEntry
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import MapCase
from gptq_cli.planning.memory import (
    ACCELERATOR_BASELINE_BYTES,
    CPU_BASELINE_BYTES,
    WorkSet,
    device_plans,
    work_sets,
)
from gptq_cli.planning.schedule import make_schedule, wider_micro_batches
from gptq_cli.planning.units import Unit, place, together, units_of
from gptq_cli.results.map import DevicePlan

_HALVINGS = 12
_ROOMY = 0.95
_ATTEMPTS = ((True, _ROOMY), (False, _ROOMY), (False, 1.0))
"""(parked forwards, share of each device to use): what each step is tried with."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a strategy came to. `placement` is None when nothing fits; `tried` says what each step lacked."""

    placement: Placement | None
    plans: tuple[DevicePlan, ...]
    schedule: Schedule | None
    """None where there is no placement, or no work is planned."""
    tried: tuple[str, ...] = ()
    spill_bytes: int = 0
    """Weights that fit nowhere: what others would spill to disk."""


class Problem:
    """A case prepared for searching: units, what may be used of each device, what working needs."""

    def __init__(self, case: MapCase, *, parked: bool, share: float = 1.0) -> None:
        self.case = case
        self.parked = parked
        self.share = share
        self.facts: ModelFacts = case.facts
        self.units = units_of(case.facts)
        self.follows = together(case.facts, self.units)
        self.work = self._largest_work_set()
        self.largest_block = max((unit.size_bytes for unit in self.units if unit.block), default=0)
        cpu = case.cpu_room
        self.cpu_room = max(0, int(share * cpu) - CPU_BASELINE_BYTES) if cpu is not None else 0

    def _largest_work_set(self) -> WorkSet:
        """What any accelerator needs that works on blocks; where they will be placed does not matter."""
        work, devices = self.case.work, self.case.accelerators
        if work is None or not devices:
            return WorkSet()
        entry = PlacementEntry("", devices[0], self.facts.size_bytes, parameters=True)
        schedule = make_schedule(Placement((entry,), devices[0], ""), self.facts, work, parked=self.parked)
        sets = work_sets(self.facts, work, schedule).values()
        return max(sets, key=lambda one: one.total_bytes, default=WorkSet())

    def room(self, device: Device) -> int:
        """Bytes for weights on an accelerator that works on blocks."""
        usable = int(self.share * (self.case.limit(device) or 0))
        return max(0, usable - ACCELERATOR_BASELINE_BYTES - self.work.total_bytes)

    def accepts(self, plans: tuple[DevicePlan, ...]) -> bool:
        """True when every device whose size is known holds its plan within the share that may be used."""
        return fits(self.case, plans, self.share)

    def outer(self) -> tuple[Unit, ...]:
        """Units outside the blocks that are worth moving: with parameters of their own, largest first."""
        found = [
            u
            for u in self.units
            if not u.block and u.parameters and u.size_bytes and u.name not in self.follows
        ]
        return tuple(sorted(found, key=lambda unit: -unit.size_bytes))

    def placed(self, assigned: dict[str, Device], reason: str, main: Device | None = None) -> Placement:
        """Units to devices; tied units follow the one they are tied to, unnamed ones the main device."""
        resolved = assigned | {
            name: assigned[first] for name, first in self.follows.items() if first in assigned
        }
        by_part = {p.name: resolved.get(u.name, main) for u in self.units for p in u.parts}
        made = place(self.facts, by_part.__getitem__, reason, main)
        if made is None:
            raise ValueError("a plan must place every unit")
        return made


Step = Callable[[Problem], Iterator[Placement]]
"""Candidates of one step, best first."""


def fill(units: Sequence[Unit], room: Sequence[tuple[Device, int]]) -> dict[str, Device] | None:
    """Put units on the devices one after another without going back; None when they do not fit."""
    assigned: dict[str, Device] = {}
    index, used = 0, 0
    for unit in units:
        while index < len(room) and used + unit.size_bytes > room[index][1]:
            index, used = index + 1, 0
        if index == len(room):
            return None
        assigned[unit.name] = room[index][0]
        used += unit.size_bytes
    return assigned


def fill_evenly(units: Sequence[Unit], room: Sequence[tuple[Device, int]]) -> dict[str, Device] | None:
    """As `fill`, with the lowest share of every device's room that still suffices."""
    best = fill(units, room)
    if best is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        found = fill(units, [(device, int(size * share)) for device, size in room])
        low, high, best = (share, high, best) if found is None else (low, share, found)
    return best


def on_one_accelerator(problem: Problem) -> Iterator[Placement]:
    """Step 1."""
    case = problem.case
    for device in sorted(case.accelerators, key=lambda d: (-(case.limit(d) or 0), d)):
        reason = f"everything on {device}: weights and work fit there"
        yield problem.placed({unit.name: device for unit in problem.units}, reason, device)


def on_accelerators(problem: Problem) -> Iterator[Placement]:
    """Step 2."""
    yield from _spread(problem, problem.units, {}, "everything on {devices}: no single one is large enough")


def blocks_on_accelerators(problem: Problem) -> Iterator[Placement]:
    """Step 3: as little as possible outside the blocks goes to cpu."""
    outer = problem.outer()[:4]
    choices = [choice for count in range(1, len(outer) + 1) for choice in combinations(outer, count)]
    for choice in sorted(choices, key=lambda units: sum(unit.size_bytes for unit in units)):
        moved = {unit.name: CPU for unit in choice}
        size = sum(unit.size_bytes for unit in choice)
        if size > problem.cpu_room:
            continue
        rest = [unit for unit in problem.units if unit.name not in moved]
        names = " and ".join(moved)
        reason = f"all blocks on {{devices}}, {names} on cpu: together they do not fit"
        yield from _spread(problem, rest, moved, reason)


def some_blocks_on_cpu(problem: Problem) -> Iterator[Placement]:
    """Step 4: the last blocks go to cpu, as few as possible; then embeddings and head, too."""
    blocks = [unit for unit in problem.units if unit.block]
    for moved_outer in ({}, {unit.name: CPU for unit in problem.outer()}):
        if moved_outer and not problem.case.accelerators:
            return
        for count in _fewest_first(len(blocks)):
            moved = moved_outer | {unit.name: CPU for unit in blocks[len(blocks) - count :]}
            size = sum(unit.size_bytes for unit in problem.units if unit.name in moved)
            if size > problem.cpu_room:
                break
            rest = [unit for unit in problem.units if unit.name not in moved]
            also = f" and {', '.join(moved_outer)}" if moved_outer else ""
            reason = (
                f"{len(blocks) - count} of {len(blocks)} blocks on {{devices}}, {count}{also} on cpu: "
                "the accelerators cannot hold all of them"
                if count < len(blocks)
                else f"all {count} blocks{also} on cpu, each moved to an accelerator in its turn: "
                "the work on one needs all the room there is"
            )
            found = list(_spread(problem, rest, moved, reason, all_devices=True))
            if found:
                yield from found
                break


def _fewest_first(blocks: int) -> range:
    return range(1, blocks + 1)


def _spread(
    problem: Problem,
    units: Sequence[Unit],
    assigned: dict[str, Device],
    reason: str,
    *,
    all_devices: bool = False,
) -> Iterator[Placement]:
    """`units` over as few accelerators as possible (or all), evenly; `assigned` are settled already."""
    case = problem.case
    settled = sum(unit.size_bytes for unit in problem.units if unit.block and unit.name in assigned)
    moved_in = problem.largest_block if settled else 0
    largest_first = sorted(case.accelerators, key=lambda d: (-(case.limit(d) or 0), d))
    counts = [len(largest_first)] if all_devices else range(1, len(largest_first) + 1)
    for count in counts:
        devices = sorted(largest_first[:count])
        room = [(device, max(0, problem.room(device) - moved_in)) for device in devices]
        found = fill_evenly([unit for unit in units if unit.name not in problem.follows], room)
        if found is not None:
            used = sorted(set(found.values()))
            main = next((found[u.name] for u in units if u.block), used[0] if used else devices[0])
            named = " and ".join(str(device) for device in used)
            yield problem.placed(assigned | found, reason.replace("{devices}", named), main)


STEPS: tuple[tuple[str, Step], ...] = (
    ("everything on one accelerator", on_one_accelerator),
    ("everything on accelerators", on_accelerators),
    ("embeddings or head on cpu", blocks_on_accelerators),
    ("blocks on cpu", some_blocks_on_cpu),
)


def _balanced(problem: Problem) -> Iterator[Placement]:
    yield from _spread(
        problem, problem.units, {}, "balanced: everything evenly on {devices}", all_devices=True
    )


def _balanced_low_0(problem: Problem) -> Iterator[Placement]:
    """As balanced, with as little as possible on the first accelerator."""
    devices = problem.case.accelerators
    if len(devices) < 2:
        yield from _balanced(problem)
        return
    units = [unit for unit in problem.units if unit.name not in problem.follows]
    first, others = devices[0], [(device, problem.room(device)) for device in devices[1:]]
    for step in range(_HALVINGS + 1):
        room = int(problem.room(first) * step / _HALVINGS)
        rest, head, used = list(units), [], 0
        while rest and fill(rest, others) is None and used + rest[0].size_bytes <= room:
            used += rest[0].size_bytes
            head.append(rest.pop(0))
        found = fill_evenly(rest, others)
        if found is not None:
            assigned = {unit.name: first for unit in head} | found
            main = next((assigned[unit.name] for unit in units if unit.block), first)
            left = "nothing" if not head else "as little as possible"
            yield problem.placed(
                assigned, f"balanced_low_0: {left} on {first}, the rest evenly on the others", main
            )
            return


def _sequential(problem: Problem) -> Iterator[Placement]:
    units = [unit for unit in problem.units if unit.name not in problem.follows]
    devices = problem.case.accelerators
    room = [(device, problem.room(device)) for device in devices]
    found = fill(units, room)
    if found is None and devices:
        moved_in = [(device, max(0, size - problem.largest_block)) for device, size in room]
        found = fill(units, [*moved_in, (CPU, problem.cpu_room)])
    if found is not None:
        main = next((found[unit.name] for unit in units if unit.block), devices[0])
        main = main if main.is_accelerator else devices[0]
        yield problem.placed(
            found, "sequential: each accelerator filled before the next, what is left on cpu", main
        )


_OTHER_STEPS: dict[str, tuple[tuple[str, Step], ...]] = {
    "balanced": (("everything on accelerators", _balanced), *STEPS[2:]),
    "balanced_low_0": (("everything on accelerators", _balanced_low_0), *STEPS[2:]),
    "sequential": (("accelerators one after another, then cpu", _sequential), *STEPS[3:]),
}


def make_plan(strategy: str, case: MapCase) -> Plan:
    """The first step of `strategy` that fits, or a plan without a placement."""
    if not case.accelerators:
        return _cpu_plan(case)
    steps = STEPS if strategy == "auto" else _OTHER_STEPS[strategy]
    problems = [Problem(case, parked=parked, share=share) for parked, share in _ATTEMPTS]
    tried: list[str] = []
    for title, step in steps:
        closest: tuple[DevicePlan, ...] = ()
        for problem in problems:
            for placement in step(problem):
                plan = planned(placement, case, parked=problem.parked)
                if problem.accepts(plan.plans):
                    return plan
                closest = closest or plan.plans
        why = _lacking(closest) if closest else _no_room(problems[-1])
        if not tried or not tried[-1].endswith(why):
            tried.append(f"{title}: {why}")
    return Plan(None, (), None, tried=tuple(tried), spill_bytes=_spill(problems[-1]))


def _cpu_plan(case: MapCase) -> Plan:
    """No accelerator: a plain CPU run, which the memory rules check like any other."""
    if not case.listed(CPU):
        return Plan(None, (), None, tried=("--max-memory lists no device that can hold the model",))
    there = any(budget.device.is_accelerator for budget in case.budgets)
    why = "--max-memory leaves no accelerator" if there else "there is no accelerator"
    made = place(case.facts, lambda name: CPU, f"everything on cpu: {why}", CPU)
    if made is None:
        raise ValueError("cpu covers every tensor")
    plan = planned(made, case, parked=True)
    return plan if all(one.fits for one in plan.plans) else planned(made, case, parked=False)


def planned(placement: Placement, case: MapCase, *, parked: bool) -> Plan:
    """A plan for this placement with the smallest micro-batch. `parked`: keep forwards parked."""
    schedule = None
    if case.work is not None:
        schedule = make_schedule(placement, case.facts, case.work, parked=parked)
    return Plan(placement, device_plans(placement, case, schedule), schedule)


def fits(case: MapCase, plans: Sequence[DevicePlan], share: float = 1.0) -> bool:
    """True when every device whose size is known holds its plan within `share` of what may be used."""
    return all(
        plan.needed_bytes <= share * plan.limit_bytes
        for plan in plans
        if case.limit(Device.parse(plan.device)) is not None
    )


def with_wide_micro_batch(plan: Plan, case: MapCase) -> Plan:
    """The same placement with the widest micro-batch for which every device keeps its last 5 % free.

    On a CPU, or with `batch_size` given, the plan is returned as it is.
    """
    if plan.placement is None or plan.schedule is None or case.work is None:
        return plan
    samples = plan.schedule.micro_batch_samples
    for wider in wider_micro_batches(plan.placement, case.work):
        schedule = replace(plan.schedule, micro_batch_samples=wider)
        plans = device_plans(plan.placement, case, schedule)
        if wider > samples and fits(case, plans, _ROOMY):
            return replace(plan, plans=plans, schedule=schedule)
    return plan


def _lacking(plans: tuple[DevicePlan, ...]) -> str:
    short = [f"{plan.device} lacks {format_size(-plan.spare_bytes)}" for plan in plans if not plan.fits]
    return ", ".join(short)


def _no_room(problem: Problem) -> str:
    """Why a step had nothing to offer."""
    case = problem.case
    needed = problem.work.total_bytes + ACCELERATOR_BASELINE_BYTES + problem.largest_block
    largest = max(case.accelerators, key=lambda device: case.limit(device) or 0)
    limit = case.limit(largest) or 0
    if needed > limit:
        return f"one block and the work on it need {format_size(needed)}, {largest} has {format_size(limit)}"
    room = sum(problem.room(device) for device in case.accelerators)
    parts = f"weights {format_size(problem.facts.size_bytes)}, room on accelerators {format_size(room)}"
    return f"{parts}, on cpu {format_size(problem.cpu_room)}"


def _spill(problem: Problem) -> int:
    """Weights beyond what accelerators (with their work set reserved) and cpu can hold together."""
    room = sum(problem.room(device) for device in problem.case.accelerators) + problem.cpu_room
    return max(0, problem.facts.size_bytes - room)
