"""What `inspect-map` and `--dry-run` answer, from facts, a resolution and all findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gptq_cli.config import AUTO_GROUPS, QuantizeConfig
from gptq_cli.fields import GroupSize
from gptq_cli.findings import PreflightReport
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.names import fold, in_blocks
from gptq_cli.placement.placement import DeviceBudget, Placement
from gptq_cli.planning.cases import Work
from gptq_cli.planning.fisher import file_bytes
from gptq_cli.planning.memory import packed_bytes, quantized_bytes, snapshot_bytes
from gptq_cli.planning.rank_plans import host_plans
from gptq_cli.planning.schedule import block_linears
from gptq_cli.planning.time import Estimate
from gptq_cli.planning.units import units_of
from gptq_cli.planning.words import streaming_words
from gptq_cli.preflight.resolve import Resolution
from gptq_cli.results.kept import OwnSettings
from gptq_cli.results.map import MapReport, QuantizePlan, StagePlan, TimeEstimate, TreeRow, Verdict


def map_report(
    facts: ModelFacts,
    resolution: Resolution,
    *,
    spec: DeviceMap,
    budgets: tuple[DeviceBudget, ...],
    max_memory: MaxMemory | None,
    report: PreflightReport | None = None,
    given: bool,
    plan: QuantizePlan | None = None,
    time: TimeEstimate | None = None,
    warnings: Sequence[str] = (),
) -> MapReport:
    """Everything that is to be shown. `report`: all findings of the job, the resolution's among them."""
    all_findings = (report or resolution.report).ordered()
    placement, schedule = resolution.placement, resolution.schedule
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
        streaming=streaming_words(facts, placement, schedule) if placement and schedule else (),
        devices=resolution.devices,
        ranks=resolution.ranks,
        hosts=host_plans(resolution.ranks),
        offload=resolution.offload,
        offload_skipped=resolution.offload_skipped,
        findings=all_findings,
        verdict=_verdict(PreflightReport(all_findings)),
        kept_dense=facts.kept,
        plan=plan,
        time=time,
        warnings=tuple(warnings),
    )


def time_shown(found: Estimate | None) -> TimeEstimate | None:
    """An estimate as a report has it."""
    return None if found is None else TimeEstimate(seconds=found.seconds, source=found.source)


def _verdict(report: PreflightReport) -> Verdict:
    if not report.ok:
        return "refused"
    warned = any(finding.level == "warning" for finding in report.findings)
    return "fits with warnings" if warned else "fits"


def group_reason(asked: GroupSize) -> str:
    """Where the group size comes from; "" where it was asked for."""
    listed = ", ".join(str(size) for size in AUTO_GROUPS)
    return f"auto: the largest of {listed} that divides every linear" if asked == "auto" else ""


def quantize_plan(
    facts: ModelFacts,
    work: Work,
    estimate: Estimate | None,
    writing_seconds: float | None = None,
    measuring_seconds: float | None = None,
) -> QuantizePlan:
    """What `--dry-run` adds. `estimate` is made elsewhere, None without one, and so are `writing_seconds` and
    `measuring_seconds`, which come on top of it."""
    reason = group_reason(work.quantize.group_size)
    work = work.on(facts)
    config, data = work.quantize, work.calibration
    weights = facts.packed_weights
    stored = sum(packed_bytes(x, config) for x in facts.packed)
    return QuantizePlan(
        bits=config.bits,
        group_size=config.group_columns,
        group_reason=reason,
        blocks=len(facts.blocks),
        linears=len(facts.packed),
        stages=_stage_plans(facts),
        own_settings=own_settings(facts, config),
        head=(facts.head.name, facts.head.in_features, facts.head.out_features) if facts.head else None,
        quantized_share=facts.quantized_share,
        bits_per_weight=8 * stored / max(1, weights),
        bits_per_parameter=8 * quantized_bytes(facts, config) / max(1, facts.parameters),
        size_before_bytes=facts.tensor_files_bytes
        if facts.decoded is not None
        else sum(t.size_bytes for t in facts.tensors if not t.buffer),
        size_after_bytes=quantized_bytes(facts, config),
        snapshot_bytes=snapshot_bytes(facts, work),
        gradient_bytes=file_bytes(facts, work),
        samples=data.samples,
        seq_len=data.seq_len,
        seconds=None
        if estimate is None
        else estimate.seconds + (writing_seconds or 0.0) + (measuring_seconds or 0.0),
        waited_share=None if estimate is None else estimate.waited_share,
        writing_seconds=writing_seconds,
        measuring_seconds=measuring_seconds,
    )


def own_settings(facts: ModelFacts, config: QuantizeConfig) -> tuple[OwnSettings, ...]:
    """Linears whose settings differ from those of the rest, folded over the blocks that they are in."""
    found: dict[tuple[str, int, int, bool], list[LinearFact]] = {}
    for linear in facts.packed:
        own = config.of_linear(linear.name)
        if config.changed(linear.name):
            key = (fold(linear.name), own.bits, own.group_columns, own.sym)
            found.setdefault(key, []).append(linear)
    alike = Counter(fold(linear.name) for linear in (*facts.packed, *facts.by_module))
    return tuple(
        OwnSettings(
            name=name if len(linears) == alike[name] else in_blocks((x.block, x.name) for x in linears),
            bits=bits,
            group_size=group,
            sym=sym,
            linears=len(linears),
        )
        for (name, bits, group, sym), linears in found.items()
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


@dataclass(slots=True)
class _Node:
    """A module on the way from the root to the entries."""

    name: str
    path: str
    devices: dict[str, None] = field(default_factory=dict)
    size_bytes: int = 0
    parameters: bool = False
    children: dict[str, _Node] = field(default_factory=dict)

    def add(self, device: str, size_bytes: int, *, parameters: bool) -> None:
        self.devices.setdefault(device)
        self.size_bytes += size_bytes
        self.parameters |= parameters

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for siblings that fold into one row."""
        below = tuple((name, child.signature) for name, child in self.children.items())
        return tuple(self.devices), self.parameters, below


def placement_tree(placement: Placement, facts: ModelFacts) -> tuple[TreeRow, ...]:
    """The rows of the tree, parents before children; equal numbered siblings are one row."""
    root = _Node("", "")
    for name, device, size, parameters in _leaves(placement, facts):
        node = root
        node.add(device, size, parameters=parameters)
        walked: list[str] = []
        for part in name.split("."):
            walked.append(part)
            node = node.children.setdefault(part, _Node(part, ".".join(walked)))
            node.add(device, size, parameters=parameters)
    return tuple(_rows(root, 0))


def _leaves(placement: Placement, facts: ModelFacts) -> Iterable[tuple[str, str, int, bool]]:
    """(name, device, bytes, parameters): the entries, or the model's units where one entry covers all."""
    if len(placement.entries) == 1 and not placement.entries[0].name:
        device = str(placement.entries[0].device)
        return [(unit.name, device, unit.size_bytes, unit.parameters) for unit in units_of(facts)]
    return [(e.name, str(e.device), e.size_bytes, e.parameters) for e in placement.entries]


def _rows(node: _Node, depth: int) -> Iterable[TreeRow]:
    children = list(node.children.values())
    start = 0
    while start < len(children):
        end = start + 1
        while end < len(children) and _folds(children[end - 1], children[end], children[start]):
            end += 1
        run = children[start:end]
        yield _row(run, depth)
        yield from _rows(run[0], depth + 1) if len(run) == 1 else ()
        start = end


def _folds(before: _Node, node: _Node, first: _Node) -> bool:
    numbers = before.name.isdigit() and node.name.isdigit() and int(node.name) == int(before.name) + 1
    return numbers and node.signature == first.signature


def _row(run: list[_Node], depth: int) -> TreeRow:
    first = run[0]
    name = first.name if len(run) == 1 else f"{first.name}-{run[-1].name}"
    above = first.path.rpartition(".")[0]
    return TreeRow(
        name=name,
        path=f"{above}.{name}" if above else name,
        depth=depth,
        devices=tuple(first.devices),
        size_bytes=sum(node.size_bytes for node in run),
        modules=len(run),
        parameters=first.parameters,
        leaf=len(run) > 1 or not first.children,
    )
