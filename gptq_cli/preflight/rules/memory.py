"""Rules about bytes: does the plan fit, and if not, what is the cheapest thing that would."""

from __future__ import annotations

from dataclasses import replace

from gptq_cli.findings import Finding
from gptq_cli.placement.device import CPU, Device, format_size
from gptq_cli.placement.device_map import DeviceMap, DeviceRule
from gptq_cli.planning.cases import MapCase, PlacedCase
from gptq_cli.planning.planner import Plan
from gptq_cli.planning.remedies import Fits, Remedy, alternatives, cheapest, less_work
from gptq_cli.planning.repair import repaired
from gptq_cli.results.map import DevicePlan

_TIGHT = 0.05


def memory_budget(placed: PlacedCase, fits: Fits) -> list[Finding]:
    """A device cannot hold what the plan needs there at its highest moment.

    The sum is weights, the working copy of the largest block, Hessians and the factorisation of its widest
    stage, calibration activations, and packing; the limit is the free memory, or --max-memory where that is
    less.
    """
    short = [plan for plan in placed.plans if not plan.fits and _known(placed.case, plan)]
    if not short:
        return []
    remedies = cheapest(placed.case, fits)
    return [
        Finding(
            rule="memory-budget",
            level="error",
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


def tight(case: MapCase, plans: tuple[DevicePlan, ...]) -> list[DevicePlan]:
    """The plans that fit, but leave less than 5 % of their device."""
    return [p for p in plans if _known(case, p) and p.fits and p.spare_bytes < _TIGHT * p.limit_bytes]


def memory_tight(placed: PlacedCase, roomy: Fits) -> list[Finding]:
    """The plan fits, but leaves less than 5 % of a device: other processes or fragmentation may take that."""
    plans = tight(placed.case, placed.plans)
    remedy = less_work(placed.case, roomy) if plans else None
    return [
        Finding(
            rule="memory-tight",
            level="warning",
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


def disk_offload(case: MapCase, plan: Plan | None, fits: Fits) -> list[Finding]:
    """Something would have to go to disk: because the device map says so, or because nothing else has room.

    Disk offload is not supported with GPTQ quantization: a module that accelerate loads from disk is a tensor
    without data as soon as its hook is removed, and the quantized one would have nowhere to be put back.
    """
    patterns = [rule.pattern for rule in case.spec.rules if rule.device.kind == "disk"]
    if patterns:
        return [
            Finding(
                rule="disk-offload",
                level="error",
                subject=", ".join(pattern or "rest" for pattern in patterns),
                message="disk offload is not supported with GPTQ quantization",
                hint=_without_disk(case, fits),
                modules=tuple(patterns),
                size_bytes=_bytes_of(case, patterns),
            )
        ]
    if plan is None or plan.placement is not None or not plan.spill_bytes:
        return []
    return [
        Finding(
            rule="disk-offload",
            level="error",
            subject=str(case.spec),
            message=(
                f"{case.spec} would have to spill {format_size(plan.spill_bytes)} to disk; disk offload "
                f"is not supported with GPTQ quantization ({'; '.join(plan.tried)})"
            ),
            hint=remedies_text(cheapest(case, fits)),
            size_bytes=plan.spill_bytes,
        )
    ]


def no_plan_fits(case: MapCase, plan: Plan | None, fits: Fits) -> list[Finding]:
    """The weights would fit, but no step of the strategy leaves room for the work on a block."""
    if plan is None or plan.placement is not None or plan.spill_bytes:
        return []
    return [
        Finding(
            rule="no-plan-fits",
            level="error",
            subject=str(case.spec),
            message=f"no plan fits: {'; '.join(plan.tried)}",
            hint=remedies_text(cheapest(case, fits)),
            size_bytes=case.facts.size_bytes,
        )
    ]


def parts_text(plan: DevicePlan) -> str:
    """`weights 14.9 GiB, Hessians 0.3 GiB, …`: the parts that are not zero."""
    return ", ".join(f"{word} {format_size(size)}" for word, size in plan.parts if size)


def remedies_text(remedies: tuple[Remedy, ...]) -> str:
    """`one; or two; or three`."""
    return alternatives(remedies) or "use a smaller model or a machine with more memory"


def _known(case: MapCase, plan: DevicePlan) -> bool:
    return case.limit(Device.parse(plan.device)) is not None


def _bytes_of(case: MapCase, patterns: list[str]) -> int:
    chosen = set(patterns)
    found = ((tensor, case.spec.rule_for(tensor.name)) for tensor in case.facts.tensors)
    return sum(tensor.size_bytes for tensor, rule in found if rule is not None and rule.pattern in chosen)


def _without_disk(case: MapCase, fits: Fits) -> str:
    """The smallest change that avoids disk: the first device, in order, that can take what goes to disk."""
    options = [*case.accelerators, CPU]
    for device in options:
        rules = tuple(
            DeviceRule(r.pattern, device) if r.device.kind == "disk" else r for r in case.spec.rules
        )
        changed = repaired(replace(case, spec=DeviceMap(rules=rules)))
        if fits(replace(case, spec=changed)):
            return f'--device-map "{changed}"'
    if fits(replace(case, spec=DeviceMap(strategy="auto"))):
        return "--device-map auto"
    without = tuple(DeviceRule(r.pattern, CPU) if r.device.kind == "disk" else r for r in case.spec.rules)
    changed = repaired(replace(case, spec=DeviceMap(rules=without)))
    remedies = cheapest(replace(case, spec=changed), fits)
    return remedies_text(tuple(_together(changed, remedy) for remedy in remedies))


def _together(changed: DeviceMap, remedy: Remedy) -> Remedy:
    """The remedy of a changed map, with the change: it alone would leave the map as it was."""
    if "--device-map" in remedy.change or not remedy.change.startswith("--"):
        return remedy
    return replace(remedy, change=f'--device-map "{changed}" {remedy.change}')
