"""What `inspect-map` and `--dry-run` answer, from facts, a resolution and all findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gptq_cli.config import AUTO_GROUPS, GroupSize
from gptq_cli.findings import PreflightReport
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import DeviceBudget
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import packed_bytes, quantized_bytes
from gptq_cli.planning.schedule import block_linears
from gptq_cli.preflight.resolve import Resolution
from gptq_cli.preflight.tree import placement_tree
from gptq_cli.results.map import MapReport, QuantizePlan, StagePlan, Verdict


def map_report(
    facts: ModelFacts,
    resolution: Resolution,
    *,
    spec: DeviceMap,
    budgets: tuple[DeviceBudget, ...],
    max_memory: MaxMemory | None = None,
    report: PreflightReport | None = None,
    given: bool = False,
    plan: QuantizePlan | None = None,
    warnings: Sequence[str] = (),
) -> MapReport:
    """Everything that is to be shown. `report`: all findings of the job, the resolution's among them."""
    all_findings = (report or resolution.report).ordered()
    placement = resolution.placement
    inventory: Literal["present", "given"] = "given" if given else "present"
    return MapReport(
        model=facts.model,
        architecture=facts.architecture,
        dtype=facts.dtype,
        parameters=facts.parameters,
        weights_bytes=facts.size_bytes,
        blocks=len(facts.blocks),
        spec=str(spec),
        max_memory=str(max_memory) if max_memory else None,
        inventory=inventory,
        budgets=budgets,
        placement=placement,
        reason=placement.reason if placement else "no placement",
        tree=placement_tree(placement, facts) if placement else (),
        devices=resolution.devices,
        offload=resolution.offload,
        offload_skipped=resolution.offload_skipped,
        findings=all_findings,
        verdict=_verdict(PreflightReport(all_findings)),
        plan=plan,
        warnings=tuple(warnings),
    )


def _verdict(report: PreflightReport) -> Verdict:
    if not report.ok:
        return "refused"
    warned = any(finding.level == "warning" for finding in report.findings)
    return "fits with warnings" if warned else "fits"


def group_reason(asked: GroupSize) -> str:
    """Where the group size comes from; "" where it was asked for."""
    listed = ", ".join(str(size) for size in AUTO_GROUPS)
    return f"auto: the largest of {listed} that divides every linear" if asked == "auto" else ""


def quantize_plan(facts: ModelFacts, work: Work, seconds: float | None) -> QuantizePlan:
    """What `--dry-run` adds. `seconds` is an estimate made elsewhere, None without one."""
    reason = group_reason(work.quantize.group_size)
    work = work.on(facts)
    config, data = work.quantize, work.calibration
    weights = sum(x.in_features * x.out_features for x in facts.linears)
    stored = sum(packed_bytes(x, config) for x in facts.linears)
    return QuantizePlan(
        bits=config.bits,
        group_size=config.group_columns,
        group_reason=reason,
        blocks=len(facts.blocks),
        linears=len(facts.linears),
        stages=_stage_plans(facts),
        quantized_share=weights / max(1, facts.parameters),
        bits_per_weight=8 * stored / max(1, weights),
        bits_per_parameter=8 * quantized_bytes(facts, config) / max(1, facts.parameters),
        size_before_bytes=sum(t.size_bytes for t in facts.tensors if not t.buffer),
        size_after_bytes=quantized_bytes(facts, config),
        samples=data.samples,
        seq_len=data.seq_len,
        seconds=seconds,
    )


def _stage_plans(facts: ModelFacts) -> tuple[StagePlan, ...]:
    """The stages of each shape of block, in order of first appearance."""
    found: dict[tuple[tuple[tuple[str, int, int], ...], ...], tuple[str, int]] = {}
    for block, linears in block_linears(facts).items():
        stages = _stages(block, linears)
        example, count = found.get(stages, (block, 0))
        found[stages] = (example, count + 1)
    return tuple(
        StagePlan(blocks=count, example=example, linears=stage)
        for stages, (example, count) in found.items()
        for stage in stages
    )


def _stages(block: str, linears: list[LinearFact]) -> tuple[tuple[tuple[str, int, int], ...], ...]:
    grouped: dict[int, list[tuple[str, int, int]]] = {}
    for linear in linears:
        relative = linear.name.removeprefix(block + ".")
        grouped.setdefault(linear.stage, []).append((relative, linear.in_features, linear.out_features))
    return tuple(tuple(grouped[number]) for number in sorted(grouped))
