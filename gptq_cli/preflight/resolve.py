"""From a device map to a placement, and everything that is to be said about it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gptq_cli.device import Device
from gptq_cli.device_map import DeviceMap, MaxMemory
from gptq_cli.errors import DiskOffloadRefused, PreflightRefused
from gptq_cli.findings import Finding, PreflightReport
from gptq_cli.placement import DeviceBudget, ModelFacts, Placement
from gptq_cli.preflight import rules_map, rules_memory, rules_placement
from gptq_cli.preflight.budget import device_plans
from gptq_cli.preflight.cases import Environment, MapCase, PlacedCase, Work
from gptq_cli.preflight.planner import Plan, make_plan
from gptq_cli.preflight.remedies import less_work
from gptq_cli.preflight.units import place
from gptq_cli.results import DevicePlan


@dataclass(frozen=True, slots=True)
class Resolution:
    """A device map, resolved. `placement` is None when there is none; then `report` holds an error."""

    placement: Placement | None
    devices: tuple[DevicePlan, ...]
    """What each device will have to hold."""
    parked: bool
    """There is room for parked forwards (each linear runs once); else replay them."""
    offload: tuple[str, ...]
    """Modules that get a cpu-offload hook, in execution order."""
    offload_skipped: tuple[str, ...]
    """cpu entries without parameters: never hooked."""
    report: PreflightReport


def resolve(
    device_map: DeviceMap,
    facts: ModelFacts,
    budgets: tuple[DeviceBudget, ...],
    *,
    max_memory: MaxMemory | None = None,
    work: Work | None = None,
    environment: Environment | None = None,
    given: bool = False,
) -> Resolution:
    """Place the model of `facts` on the devices of `budgets`; never raises, reports all findings at once.

    `work` is the quantization that must fit beside the weights; without it only the weights count. `given`:
    the budgets describe other hardware than this machine's.
    """
    kind = next((b.device.kind for b in budgets if b.device.is_accelerator), "cuda")
    case = MapCase(
        spec=device_map.on(kind),
        facts=facts,
        budgets=budgets,
        max_memory=max_memory.on(kind) if max_memory else None,
        work=work,
        environment=environment or Environment(),
        given=given,
    )
    findings = [finding for rule in rules_map.RULES for finding in rule(case)]
    plan = make_plan(case.spec.strategy, case) if case.spec.strategy else _from_rules(case)
    findings += rules_memory.disk_offload(case, plan, _fits)
    findings += rules_memory.no_plan_fits(case, plan if case.spec.strategy else None, _fits)
    if plan is None or plan.placement is None:
        return Resolution(None, (), parked=False, offload=(), offload_skipped=(), report=_report(findings))
    remedy = less_work(case, _fits_without_cpu) if plan.placement.offloaded and case.spec.strategy else None
    placed = PlacedCase(
        case=case, placement=plan.placement, plans=plan.plans, without_cpu=str(remedy) if remedy else ""
    )
    findings += [finding for rule in rules_placement.RULES for finding in rule(placed)]
    findings += rules_memory.memory_budget(placed, _fits)
    findings += rules_memory.memory_tight(placed)
    return Resolution(
        plan.placement, plan.plans, plan.parked, placed.offload, placed.offload_skipped, _report(findings)
    )


def _report(findings: list[Finding]) -> PreflightReport:
    return PreflightReport(PreflightReport(tuple(findings)).ordered())


def _from_rules(case: MapCase) -> Plan | None:
    """What the rules say, to the letter; None where they leave a parameter without a device."""

    def device_of(name: str) -> Device | None:
        rule = case.rule_for(name)
        return rule.device if rule else None

    reason = "as the device map says"
    placement = place(case.facts, device_of, reason)
    if placement is None or any(device.kind == "meta" for device in placement.devices):
        return None
    for parked in (True, False):
        plans = device_plans(placement, case, parked=parked)
        if _all_fit(case, plans):
            return Plan(placement, plans, parked)
    return Plan(placement, device_plans(placement, case, parked=False), parked=False)


def _all_fit(case: MapCase, plans: tuple[DevicePlan, ...]) -> bool:
    return all(plan.fits for plan in plans if case.limit(Device.parse(plan.device)) is not None)


def _fits(case: MapCase) -> bool:
    """Whether the case would be accepted as far as devices and memory go; remedies are tried with this."""
    plan = make_plan(case.spec.strategy, case) if case.spec.strategy else _from_rules(case)
    if plan is None or plan.placement is None:
        return False
    if any(device.kind == "disk" for device in plan.placement.devices):
        return False
    placed = PlacedCase(case=replace(case), placement=plan.placement, plans=plan.plans)
    refused = rules_placement.block_split(placed) or rules_placement.tied_split(placed)
    absent = rules_map.device_absent(case) or rules_map.meta_device(case)
    return _all_fit(case, plan.plans) and not refused and not absent


def _fits_without_cpu(case: MapCase) -> bool:
    """Whether a strategy would find a plan that leaves the cpu out."""
    plan = make_plan(case.spec.strategy or "auto", case)
    return plan.placement is not None and not plan.placement.offloaded


def refusal(report: PreflightReport) -> PreflightRefused:
    """The error for a report with errors; a `ValueError` as well where disk offload is among them."""
    disk = any(f.rule == "disk-offload" and f.level == "error" for f in report.findings)
    return DiskOffloadRefused(report) if disk else PreflightRefused(report)


def refuse_disk(placement: Placement | DeviceMap) -> None:
    """Raise `ValueError` when anything would be quantized from disk; for callers that skip the report."""
    if any(device.kind == "disk" for device in placement.devices):
        raise ValueError("disk offload is not supported with GPTQ quantization")
