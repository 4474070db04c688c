"""Our own plans for `auto`, `balanced`, `balanced_low_0` and `sequential`.

Transformers' `auto` fills the cards with weights and leaves nothing for Hessians and activations, which is
the most reported way to run out of memory with a device map. Here the weights of the blocks rest in the files
and are read when their turn comes, so a device that works on blocks needs room for one of them, for the work
on it, and for what lies outside the blocks. `auto` takes the first of these steps that fits:

    1  everything on one accelerator, the one with most room
    2  several accelerators, as few as possible: runs of blocks of equal length, embedding and head at the
       ends; or all blocks on the one with most room, embedding and head on the others
    3  the same with embedding or head on cpu, brought in by hooks, with the warning about offload
    4  refusal; preflight names the cheapest remedies

A step is a function from a problem to placements. Each placement is tried in the `WAYS` of planning.schedule,
the fastest first, with 5 % of every device kept free, and only then without. What decides whether a plan fits
is `device_plans`, never the search itself. The search plans for the smallest micro-batch;
`with_wide_micro_batch` makes it larger afterwards, where the plan leaves room.

Blocks that rest on the cpu beside an accelerator need more of either device than blocks that rest in the
files, so no plan has them; a map that asks for them gets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device, format_size
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import MapCase
from gptq_cli.planning.device_plans import device_plans
from gptq_cli.planning.schedule import (
    EXPERT_BATCH_BYTES,
    WAYS,
    make_schedule,
    wider_expert_batches,
    wider_micro_batches,
)
from gptq_cli.planning.units import Unit, place, together, units_of
from gptq_cli.results.map import DevicePlan

_ROOMY = 0.95
"""The share of each device that a plan uses where it can."""
_OUTER = 4
"""So many modules outside the blocks, the largest, may be moved."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a strategy came to. `placement` is None when nothing fits; `tried` says what each step lacked."""

    placement: Placement | None
    plans: tuple[DevicePlan, ...]
    schedule: Schedule | None
    """None where there is no placement, or no work is planned."""
    tried: tuple[str, ...] = ()


class Problem:
    """A case prepared for searching: the pieces that a plan moves around."""

    def __init__(self, case: MapCase) -> None:
        self.case = case
        self.facts: ModelFacts = case.facts
        self.units = units_of(case.facts)
        self.follows = together(case.facts, self.units)
        self.blocks = [unit for unit in self.units if unit.block]
        first = next((at for at, unit in enumerate(self.units) if unit.block), 0)
        self.before = {unit.name for unit in self.units[:first]}
        """What runs before the first block."""

    @property
    def by_room(self) -> list[Device]:
        """The accelerators, that with most room first."""
        return sorted(self.case.accelerators, key=lambda d: (-(self.case.limit(d) or 0), d))

    def outer(self) -> tuple[Unit, ...]:
        """Units outside the blocks that are worth moving, because something of them is in memory: largest
        first."""
        found = [
            unit
            for unit in self.units
            if not unit.block and unit.name not in self.follows and self._held_bytes(unit)
        ]
        return tuple(sorted(found, key=lambda unit: -self._held_bytes(unit))[:_OUTER])

    def _held_bytes(self, unit: Unit) -> int:
        uncalled = self.facts.uncalled
        return sum(p.size_bytes for p in unit.parts if not p.buffer and p.name not in uncalled)

    def placed(self, assigned: dict[str, Device], reason: str, main: Device) -> Placement:
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
IN_TURN = "each block is read from the files when its turn comes"


def on_one_accelerator(problem: Problem) -> Iterator[Placement]:
    """Step 1."""
    for device in problem.by_room:
        yield _on(problem, device, f"everything on {device}; {IN_TURN}")


def on_accelerators(problem: Problem) -> Iterator[Placement]:
    """Step 2."""
    devices = problem.by_room
    for count in range(2, len(devices) + 1):
        reason = f"everything on {{devices}}: no single one has room for all of it; {IN_TURN}"
        yield _in_runs(problem, sorted(devices[:count]), {}, reason)
        yield from _around_blocks(problem, devices[:count], reason)


def outer_on_cpu(problem: Problem) -> Iterator[Placement]:
    """Step 3: as little as possible outside the blocks goes to cpu."""
    outer, devices = problem.outer(), problem.by_room
    if problem.case.cpu_room is None or not outer:
        return
    least = best_way(_on(problem, devices[0], "a bound"), problem.case)
    if _lack(least) > sum(unit.size_bytes for unit in outer):
        yield _in_runs(problem, devices[:1], {unit.name: CPU for unit in outer}, "a bound")
        return  # moving all of it would not be enough
    choices = [choice for count in range(1, len(outer) + 1) for choice in combinations(outer, count)]
    for choice in sorted(choices, key=lambda units: sum(unit.size_bytes for unit in units)):
        moved = {unit.name: CPU for unit in choice}
        names = " and ".join(moved)
        for count in range(1, len(devices) + 1):
            reason = f"the blocks on {{devices}}, {names} on cpu: together they do not fit; {IN_TURN}"
            yield _in_runs(problem, sorted(devices[:count]), moved, reason)


def _on(problem: Problem, device: Device, reason: str) -> Placement:
    return problem.placed({unit.name: device for unit in problem.units}, reason, device)


def _in_runs(problem: Problem, devices: Sequence[Device], moved: dict[str, Device], reason: str) -> Placement:
    """Runs of blocks of equal length, one for each device; what is outside at the ends, or where `moved`
    says."""
    total, first, last = len(problem.blocks), devices[0], devices[-1]
    runs = {block.name: devices[at * len(devices) // total] for at, block in enumerate(problem.blocks)}
    outer = {unit.name: first if unit.name in problem.before else last for unit in problem.units}
    return problem.placed({**outer, **runs, **moved}, _named(reason, devices), first)


def _around_blocks(problem: Problem, devices: Sequence[Device], reason: str) -> Iterator[Placement]:
    """The blocks on the first device, and what is outside on the others in turn: as few modules as do."""
    first, *others = devices
    outer = problem.outer()
    for count in range(1, len(outer) + 1):
        moved = {unit.name: others[at % len(others)] for at, unit in enumerate(outer[:count])}
        rest = {unit.name: first for unit in problem.units if unit.name not in moved}
        yield problem.placed({**rest, **moved}, _named(reason, sorted(devices)), first)


def _named(reason: str, devices: Sequence[Device]) -> str:
    return reason.replace("{devices}", " and ".join(map(str, devices)))


STEPS: tuple[tuple[str, Step], ...] = (
    ("everything on one accelerator", on_one_accelerator),
    ("several accelerators", on_accelerators),
    ("embedding or head on cpu", outer_on_cpu),
)


def _balanced(problem: Problem) -> Iterator[Placement]:
    devices = problem.case.accelerators
    for count in range(len(devices), 0, -1):
        chosen = sorted(problem.by_room[:count])
        yield _in_runs(problem, chosen, {}, f"balanced: the blocks evenly on {{devices}}; {IN_TURN}")


def _balanced_low_0(problem: Problem) -> Iterator[Placement]:
    """As balanced, with nothing on the first accelerator where there are others."""
    first, *others = problem.case.accelerators
    if others:
        reason = f"balanced_low_0: nothing on {first}, the blocks evenly on {{devices}}; {IN_TURN}"
        yield _in_runs(problem, others, {}, reason)
    yield from _balanced(problem)


def _sequential(problem: Problem) -> Iterator[Placement]:
    """Blocks that rest in the files fill no device, so the first one that can work on them has all."""
    for device in problem.case.accelerators:
        yield _on(problem, device, f"sequential: {device} is the first with room for the work; {IN_TURN}")


_OTHER_STEPS: dict[str, tuple[tuple[str, Step], ...]] = {
    "balanced": (("everything on accelerators", _balanced), *STEPS[2:]),
    "balanced_low_0": (("everything on accelerators", _balanced_low_0), *STEPS[2:]),
    "sequential": (("accelerators one after another", _sequential), *STEPS[1:]),
}


def make_plan(strategy: str, case: MapCase) -> Plan:
    """The first step of `strategy` that fits, or a plan without a placement."""
    if not case.accelerators:
        return _cpu_plan(case)
    problem = Problem(case)
    tried: list[str] = []
    for title, step in STEPS if strategy == "auto" else _OTHER_STEPS[strategy]:
        closest: Plan | None = None
        for placement in step(problem):
            plan = best_way(placement, case)
            if fits(case, plan.plans):
                return plan
            closest = plan if closest is None or _lack(plan) < _lack(closest) else closest
        if closest is not None:
            tried.append(f"{title}: {_lacking(closest.plans)}")
    return Plan(None, (), None, tried=tuple(dict.fromkeys(tried)))


def _cpu_plan(case: MapCase) -> Plan:
    """No accelerator: a plain CPU run, which the memory rules check like any other."""
    free = replace(case, max_memory=None)
    if case.cpu_room is None:
        which = "--max-memory lists" if free.accelerators or free.cpu_room else "--devices lists"
        return Plan(None, (), None, tried=(f"{which} no device that can hold the model",))
    there = any(budget.device.is_accelerator for budget in case.budgets)
    why = "no accelerator has free memory" if there else "there is no accelerator"
    if free.accelerators:
        why = "--max-memory leaves no accelerator"
    made = place(case.facts, lambda name: CPU, f"everything on cpu: {why}", CPU)
    if made is None:
        raise ValueError("cpu covers every tensor")
    return best_way(made, case)


def best_way(placement: Placement, case: MapCase) -> Plan:
    """The plan for this placement in the fastest way that leaves room; else in the fastest that fits; else in
    the leanest. The micro-batch is the smallest."""
    if case.work is None:
        return Plan(placement, device_plans(placement, case, None), None)
    schedules = list(dict.fromkeys(make_schedule(placement, case.facts, case.work, way) for way in WAYS))
    leanest = _planned(placement, case, schedules[-1])
    if not fits(case, leanest.plans):
        return leanest
    plans: list[Plan] = []
    for schedule in schedules:
        plan = _planned(placement, case, schedule)
        if fits(case, plan.plans, _ROOMY):
            return plan
        plans.append(plan)
    return next(plan for plan in plans if fits(case, plan.plans))


def _planned(placement: Placement, case: MapCase, schedule: Schedule) -> Plan:
    return Plan(placement, device_plans(placement, case, schedule), schedule)


def fits(case: MapCase, plans: Sequence[DevicePlan], share: float = 1.0) -> bool:
    """True when every device that is there holds its plan within `share` of what may be used."""
    return all(
        plan.needed_bytes <= share * plan.limit_bytes
        for plan in plans
        if case.decides(Device.parse(plan.device))
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


def with_wide_expert_batches(plan: Plan, case: MapCase) -> Plan:
    """The same with larger batches of experts, where every device keeps its last 5 % free.

    Of several ranks the batches are those for which one process has room, so that they do not depend on the
    number of ranks; where it has room for none, the smallest for which each of all ranks has.
    """
    if plan.placement is None or plan.schedule is None or case.work is None:
        return plan
    if {block.expert_batch_bytes for block in plan.schedule.blocks} != {EXPERT_BATCH_BYTES}:
        return plan  # memory is too short for the usual ones
    sizes = wider_expert_batches(plan.placement, case.facts, case.work)
    alone = replace(case, work=replace(case.work, ranks=min(1, case.work.ranks)))
    for wider, of_whom in (*((size, alone) for size in sizes), *((size, case) for size in sizes[-1:])):
        blocks = tuple(replace(block, expert_batch_bytes=wider) for block in plan.schedule.blocks)
        schedule = replace(plan.schedule, blocks=blocks)
        plans = device_plans(plan.placement, case, schedule)
        needed = plans if of_whom is case else device_plans(plan.placement, of_whom, schedule)
        if fits(case, needed, _ROOMY) and fits(case, plans, _ROOMY):
            return replace(plan, plans=plans, schedule=schedule)
    return plan


def _lack(plan: Plan) -> int:
    return sum(max(0, -one.spare_bytes) for one in plan.plans)


def _lacking(plans: tuple[DevicePlan, ...]) -> str:
    short = [f"{plan.device} lacks {format_size(-plan.spare_bytes)}" for plan in plans if not plan.fits]
    return ", ".join(short)
