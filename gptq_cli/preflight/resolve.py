"""From a device map to a placement, with the findings about both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

from gptq_cli.errors import DiskOffloadRefused, PreflightRefused
from gptq_cli.findings import Finding, PreflightReport
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import DeviceBudget, Placement, RankPlace
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Environment, MapCase, PlacedCase, Work
from gptq_cli.planning.planner import (
    Plan,
    best_way,
    fits,
    make_plan,
    with_wide_expert_batches,
    with_wide_micro_batch,
)
from gptq_cli.planning.rank_plans import rank_plans
from gptq_cli.planning.remedies import Remedy, alternatives, less_work
from gptq_cli.planning.repair import repaired, usable
from gptq_cli.planning.units import place
from gptq_cli.preflight.rules import device_map as rules_map
from gptq_cli.preflight.rules import memory as rules_memory
from gptq_cli.preflight.rules import placement as rules_placement
from gptq_cli.results.map import DevicePlan, RankMemory
from gptq_cli.rules import rules_in


@dataclass(frozen=True, slots=True)
class Resolution:
    """A device map, resolved. `placement` is None when there is none; then `report` holds an error."""

    placement: Placement | None
    devices: tuple[DevicePlan, ...]
    """What each device will have to hold."""
    schedule: Schedule | None
    """How the work is carried out; None where there is no placement, or no work is planned."""
    offload: tuple[str, ...]
    """Modules that get a cpu-offload hook, in execution order."""
    offload_skipped: tuple[str, ...]
    """cpu entries without parameters: never hooked."""
    report: PreflightReport
    ranks: tuple[RankMemory, ...] = ()
    """What the devices of each of several processes will have to hold."""


def resolve(
    device_map: DeviceMap,
    facts: ModelFacts,
    budgets: tuple[DeviceBudget, ...],
    *,
    max_memory: MaxMemory | None = None,
    work: Work | None = None,
    environment: Environment | None = None,
    given: bool = False,
    places: tuple[RankPlace, ...] = (),
) -> Resolution:
    """Place the model of `facts` on the devices of `budgets`; never raises, reports all findings at once.

    `work` is the quantization that must fit beside the weights; without it only the weights count. `given`:
    the budgets describe other hardware than this machine's. `places`: of the processes that share the work,
    which each work on their own with what all can count on, `budgets`.
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
        places=places,
    )
    findings = _answers(rules_map, case)
    if any(finding.rule in _REPAIRED for finding in findings):
        case = replace(case, repair=_repair(case))
        findings = _answers(rules_map, case)
    plan = _planned(case)
    if plan is not None and plan.placement is not None:
        plan = with_wide_expert_batches(with_wide_micro_batch(plan, case), case)
    ranks = rank_plans(plan.placement, case, plan.schedule) if plan is not None and plan.placement else ()
    about_memory = _answers(
        rules_memory, rules_memory.PlannedCase(case=case, plan=plan, fits=_fits, roomy=_roomy, ranks=ranks)
    )
    if plan is None or plan.placement is None:
        findings += about_memory
        return Resolution(None, (), None, offload=(), offload_skipped=(), report=_report(findings))
    placed = PlacedCase(case=case, placement=plan.placement, plans=plan.plans)
    found = _about_the_placement(placed)
    if any(finding.rule in _REPAIRED for finding in found) and not case.repair:
        placed = replace(placed, case=replace(case, repair=_repair(case)))
        found = _about_the_placement(placed)
    findings += found + about_memory
    return Resolution(
        plan.placement,
        plan.plans,
        plan.schedule,
        placed.offload,
        placed.offload_skipped,
        _report(findings),
        ranks,
    )


_REPAIRED = frozenset(
    rule.id
    for rule in (
        rules_map.meta_device,
        rules_map.device_absent,
        rules_map.device_not_listed,
        rules_map.unknown_module,
        rules_map.uncovered_parameters,
        rules_placement.block_split,
        rules_placement.tied_split,
    )
)
"""Rules that offer another map."""


def _answers(rules: ModuleType, case: object) -> list[Finding]:
    """What the rules of a module say about a case."""
    return [finding for rule in rules_in(rules) for finding in rule(case)]


def _about_the_placement(placed: PlacedCase) -> list[Finding]:
    case, everywhere = placed.case, placed.placement.devices
    if placed.placement.offloaded:
        placed = replace(placed, without_offload=_without_offload(case))
    elif everywhere == (CPU,) and case.accelerators:
        placed = replace(placed, on_accelerators=alternatives(_on_accelerators(case)))
    runs = rules_placement.block_runs(placed)
    if runs is not None:
        placed = replace(placed, in_runs=_repair(replace(case, spec=runs)))
    return _answers(rules_placement, placed)


def _without_offload(case: MapCase) -> str:
    """Ways to do without offload: less work, our own plan, or no accelerator."""
    if case.spec.strategy is not None:
        less = less_work(case, _fits_without_cpu)
        if less is not None:
            return f"{less} keeps everything on accelerators"
    found = []
    if case.spec.strategy is None and _fits_without_cpu(replace(case, spec=DeviceMap(strategy="auto"))):
        found.append(Remedy("--device-map auto", "everything on accelerators"))
    if case.cpu_room is not None and _fits(replace(case, spec=DeviceMap.parse("cpu"))):
        found.append(Remedy("--device-map cpu", "no hooks and no accelerator: slower"))
    return alternatives(tuple(found))


def _on_accelerators(case: MapCase) -> tuple[Remedy, ...]:
    """Maps that use accelerators and fit."""
    first, auto = str(case.accelerators[0]), DeviceMap(strategy="auto")
    found = []
    if _fits(replace(case, spec=DeviceMap.parse(first))):
        found.append(Remedy(f"--device-map {first}", "everything there"))
    if case.spec != auto and _fits(replace(case, spec=auto)):
        found.append(Remedy("--device-map auto", "our own plan"))
    return tuple(found)


def _repair(case: MapCase) -> str:
    """Options in place of a faulty map: the repaired one where it fits, or `auto`, then both with less work,
    then no accelerator. Where nothing fits, the repaired map: the rules about memory say the rest."""
    if not any(usable(case, budget.device) for budget in case.budgets):
        case = replace(case, max_memory=None)  # it lists nothing that is there, and is mended by its own hint
    changed = repaired(case)
    cases = [replace(case, spec=spec) for spec in (changed, DeviceMap(strategy="auto"))]
    for one in cases:
        if _fits(one):
            return f'--device-map "{one.spec}"'
    for one in cases:
        remedy = less_work(one, _fits)
        if remedy is not None:
            return f'--device-map "{one.spec}" {remedy.change}'
    cpu = DeviceMap.parse("cpu")
    return f'--device-map "{cpu if _fits(replace(case, spec=cpu)) else changed}"'


def _report(findings: list[Finding]) -> PreflightReport:
    return PreflightReport(PreflightReport(tuple(findings)).ordered())


def _from_rules(case: MapCase) -> Plan | None:
    """The map as it is written; None where it leaves a parameter without a device."""

    def device_of(name: str) -> Device | None:
        entry = case.rule_for(name)
        return entry.device if entry else None

    reason = "as the device map says"
    placement = place(case.facts, device_of, reason)
    if placement is None or any(device.kind == "meta" for device in placement.devices):
        return None
    return best_way(placement, case)


def _roomy(case: MapCase) -> bool:
    """Whether the case fits, and leaves room on every device."""
    plan = _planned(case)
    return plan is not None and _fits(case) and not rules_memory.tight(plan.plans)


def _planned(case: MapCase) -> Plan | None:
    return make_plan(case.spec.strategy, case) if case.spec.strategy else _from_rules(case)


def _fits(case: MapCase) -> bool:
    """Whether the case would be accepted as far as devices and memory go; remedies are tried with this."""
    plan = _planned(case)
    if plan is None or plan.placement is None:
        return False
    if any(device.kind == "disk" for device in plan.placement.devices):
        return False
    placed = PlacedCase(case=replace(case), placement=plan.placement, plans=plan.plans)
    refused = rules_placement.block_split(placed) or rules_placement.tied_split(placed)
    rules = (rules_map.device_absent, rules_map.meta_device, rules_map.device_not_listed)
    return fits(case, plan.plans) and not refused and not any(rule(case) for rule in rules)


def _fits_without_cpu(case: MapCase) -> bool:
    """Whether a strategy would find a plan that leaves the cpu out."""
    plan = make_plan(case.spec.strategy or "auto", case)
    return plan.placement is not None and CPU not in plan.placement.devices


def refusal(report: PreflightReport) -> PreflightRefused:
    """The error for a report with errors; a `ValueError` as well where disk offload is among them."""
    disk = any(f.rule == rules_memory.disk_offload.id and f.level == "error" for f in report.findings)
    return DiskOffloadRefused(report) if disk else PreflightRefused(report)
