"""Rules about memory: does the plan fit, and if not, what is the cheapest change that would make it fit?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gptq_cli.placement.device import CPU, Device, format_size
from gptq_cli.placement.device_map import DeviceMap, DeviceRule
from gptq_cli.placement.placement import RankPlace
from gptq_cli.planning.cases import MapCase
from gptq_cli.planning.planner import Plan
from gptq_cli.planning.remedies import Fits, Remedy, alternatives, cheapest, less_work
from gptq_cli.planning.repair import repaired
from gptq_cli.results.map import DevicePlan, RankMemory
from gptq_cli.rules import Remark, rule

_TIGHT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCase:
    """A device map, what was planned for it, and how another one would be planned."""

    case: MapCase
    plan: Plan | None
    """None where the map leaves a parameter without a device."""
    fits: Fits
    """Whether another case would be accepted: remedies are tried before they are named."""
    roomy: Fits
    """The same, with room left on every device."""
    ranks: tuple[RankMemory, ...] = ()
    """Several processes: what the devices of each will have to hold."""

    @property
    def device_plans(self) -> tuple[DevicePlan, ...]:
        """What each device will have to hold; none without a placement."""
        return self.plan.plans if self.plan is not None and self.plan.placement is not None else ()


NO_DISK = "disk offload is not supported with GPTQ quantization"


@rule("error")
def disk_offload(planned: PlannedCase) -> list[Remark]:
    """The device map sends something to disk.

    Disk offload is not supported with GPTQ quantization: a module that accelerate loads from disk is a tensor
    without data as soon as its hook is removed, and the quantized one would have nowhere to be put back. It
    is not needed either: the weights of a block are read from the model's files when its turn comes, and
    leave memory after it.
    """
    case, fits = planned.case, planned.fits
    patterns = [entry.pattern for entry in case.spec.rules if entry.device.kind == "disk"]
    if not patterns:
        return []
    return [
        Remark(
            subject=", ".join(pattern or "rest" for pattern in patterns),
            message=NO_DISK,
            hint=_without_disk(case, fits),
            modules=tuple(patterns),
            size_bytes=_bytes_of(case, patterns),
        )
    ]


@rule("error")
def no_plan_fits(planned: PlannedCase) -> list[Remark]:
    """No step of the strategy leaves room for the work on a block and for what lies outside the blocks."""
    case, plan = planned.case, planned.plan
    if case.spec.strategy is None or plan is None or plan.placement is not None:
        return []
    return [
        Remark(
            subject=str(case.spec),
            message=f"no plan fits: {'; '.join((*plan.tried, *_least_room(case.places)))}",
            hint=remedies_text(cheapest(case, planned.fits)),
            size_bytes=case.facts.size_bytes,
        )
    ]


@rule("error")
def memory_budget(planned: PlannedCase) -> list[Remark]:
    """A device cannot hold what the plan needs there at its peak.

    The peak is the sum of the weights that are there at once (one block, and what rests there), the bytes of
    the next block where it is read ahead, the working copy of the largest block, Hessians and the
    factorisation of its widest stage, calibration activations, and packing; the limit is the free memory, or
    --max-memory where that is less. Of several processes each counts with its share of the work, and its
    share of its machine's main memory; the one that lacks most is named.
    """
    if planned.ranks:
        return _short_ranks(planned)
    short = [
        plan
        for plan in planned.device_plans
        if not plan.fits and planned.case.decides(Device.parse(plan.device))
    ]
    if not short:
        return []
    remedies = cheapest(planned.case, planned.fits)
    return [
        Remark(
            subject=plan.device,
            message=(
                f"{plan.device} needs {format_size(plan.needed_bytes)} but may use "
                f"{format_size(plan.limit_bytes)}: {parts_text(plan)}"
            ),
            hint=remedies_text(remedies),
            size_bytes=-plan.spare_bytes,
        )
        for plan in short
    ]


def _short_ranks(planned: PlannedCase) -> list[Remark]:
    """Of several processes, for each kind of device the one that lacks most, and how many others do."""
    found = []
    for main in (False, True):
        short = [
            (rank, plan)
            for rank in planned.ranks
            for plan in rank.devices
            if not plan.fits and (plan.device == str(CPU)) == main
        ]
        if not short:
            continue
        rank, plan = min(short, key=lambda one: one[1].spare_bytes)
        others = [other.name for other, _ in short if other is not rank]
        also = f"; {others[0]} lacks room as well" if len(others) == 1 else ""
        also = f"; {len(others)} more ranks lack room as well" if len(others) > 1 else also
        sharing = sum(other.host == rank.host for other in planned.ranks)
        shared = main and sharing > 1 and plan.limit_bytes == plan.free_bytes
        share = f", its share as one of {sharing} processes there" if shared else ""
        found.append(
            Remark(
                subject=rank.name,
                message=(
                    f"{plan.device} needs {format_size(plan.needed_bytes)} but may use "
                    f"{format_size(plan.limit_bytes)}{share}: {parts_text(plan)}{also}"
                ),
                hint=remedies_text(cheapest(planned.case, planned.fits)),
                size_bytes=-plan.spare_bytes,
            )
        )
    return found


def _least_room(places: tuple[RankPlace, ...]) -> tuple[str, ...]:
    """Of several processes, whose device and whose main memory is the smallest: all work by one plan."""
    if len(places) < 2:
        return ()
    found = {}
    for at in range(len(places[0].budgets)):
        place = min(places, key=lambda one: one.budgets[at].free_bytes)
        budget = place.budgets[at]
        found[budget.device] = f"{budget.device} of {place} with {format_size(budget.free_bytes)} free"
    return (f"all ranks work by one plan, and the least room is on {' and on '.join(found.values())}",)


def tight(plans: tuple[DevicePlan, ...]) -> list[DevicePlan]:
    """The plans that fit, but leave less than 5 % of their device."""
    return [p for p in plans if p.fits and p.spare_bytes < _TIGHT * p.limit_bytes]


@rule("warning")
def memory_tight(planned: PlannedCase) -> list[Remark]:
    """The plan fits, but leaves less than 5 % of a device: other processes or fragmentation may take that."""
    plans = tight(planned.device_plans)
    remedy = less_work(planned.case, planned.roomy) if plans else None
    return [
        Remark(
            subject=plan.device,
            message=(
                f"{plan.device} needs {format_size(plan.needed_bytes)} of {format_size(plan.limit_bytes)}; "
                f"{format_size(plan.spare_bytes)} would be left"
            ),
            hint=str(remedy) if remedy else "end other processes before they take what is left",
            size_bytes=plan.needed_bytes,
        )
        for plan in plans
    ]


def parts_text(plan: DevicePlan) -> str:
    """`weights 14.9 GiB, Hessians 0.3 GiB, …`: the parts that are not zero."""
    return ", ".join(f"{word} {format_size(size)}" for word, size in plan.parts if size)


def remedies_text(remedies: tuple[Remedy, ...]) -> str:
    """`one; or two; or three`."""
    return alternatives(remedies) or "use a smaller model or a machine with more memory"


def _bytes_of(case: MapCase, patterns: list[str]) -> int:
    named = set(patterns)
    found = ((tensor, case.spec.rule_for(tensor.name)) for tensor in case.facts.tensors)
    return sum(tensor.size_bytes for tensor, entry in found if entry is not None and entry.pattern in named)


def _without_disk(case: MapCase, fits: Fits) -> str:
    """The smallest change that avoids disk: the first device, in order, that can take what goes to disk."""
    anyway = " (weights are read from the files anyway: leave disk out)" if case.work is not None else ""
    options = [*case.accelerators, CPU]
    for device in options:
        rules = tuple(
            DeviceRule(r.pattern, device) if r.device.kind == "disk" else r for r in case.spec.rules
        )
        changed = repaired(replace(case, spec=DeviceMap(rules=rules)))
        if fits(replace(case, spec=changed)):
            return f'--device-map "{changed}"{anyway}'
    if fits(replace(case, spec=DeviceMap(strategy="auto"))):
        return f"--device-map auto{anyway}"
    without = tuple(DeviceRule(r.pattern, CPU) if r.device.kind == "disk" else r for r in case.spec.rules)
    changed = repaired(replace(case, spec=DeviceMap(rules=without)))
    remedies = cheapest(replace(case, spec=changed), fits)
    return remedies_text(tuple(_together(changed, remedy) for remedy in remedies))


def _together(changed: DeviceMap, remedy: Remedy) -> Remedy:
    """The remedy of a changed map, with the change: it alone would leave the map as it was."""
    if "--device-map" in remedy.change or not remedy.change.startswith("--"):
        return remedy
    return replace(remedy, change=f'--device-map "{changed}" {remedy.change}')
