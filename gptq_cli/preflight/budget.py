"""How many bytes each device must hold at its highest moment.

For a device that works on blocks (T = samples · seq_len tokens, t = tokens of one micro-batch, b = bytes of a
number in the model's dtype, K and N of a linear, h = hidden size):

    weights      every parameter and buffer that lives there
    working      the largest block that is moved in from elsewhere, and for the widest stage (ΣN rows of K)
                 its weights in fp32, quantized copy, error and scratch: SOLVER_COPIES · 4 · ΣN · K
                 or, if that is more, the activations of one micro-batch in flight:
                 t · (FLIGHT_HIDDEN · h + FLIGHT_INNER · max ΣN) · b + 4 · t · K
                 or, if that is more, an embedding or head that is moved in
    Hessians     H, the damped copy, its factor and that of the inverse: HESSIAN_COPIES · 4 · K² for the
                 widest K; without true-sequential stages the H of every other stage of the block as well
    activations  T · h · b: the inputs of the block, which its outputs replace micro-batch by micro-batch;
                 with parked forwards also what waits between two stages: T · max K · b
    packing      codes as bytes and as 32-bit words of one stage: 5 · ΣN · K
    baseline     interpreter and libraries (cpu), or context and allocator slack (accelerator)

The CPU holds, whatever runs elsewhere, the baseline and the packed tensors that wait for their shard to
fill. The constants were measured, see docs/preflight-rules.md; the report of each run sets prediction
beside measurement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gptq_cli.config import QuantizeConfig
from gptq_cli.device import CPU, Device
from gptq_cli.placement import LinearFact, ModelFacts, Placement
from gptq_cli.preflight.cases import MapCase, Work
from gptq_cli.results import DevicePlan

MIB = 1 << 20
SOLVER_COPIES = 4
HESSIAN_COPIES = 4
FLIGHT_HIDDEN = 6
FLIGHT_INNER = 3
CPU_BASELINE_BYTES = 420 * MIB
"""Resident set of the interpreter with torch, transformers and accelerate imported and a tokenizer loaded."""
ACCELERATOR_BASELINE_BYTES = 768 * MIB
"""Device context, library workspaces, and what the caching allocator cannot hand out again."""
MICRO_BATCH_TOKENS = 8192
"""Tokens of a micro-batch where no batch size was asked for."""


@dataclass(frozen=True, slots=True)
class StageShape:
    """A stage reduced to what costs memory: `rows` = ΣN of its linears over `in_features` = K columns."""

    in_features: int
    rows: int


def stages_of(linears: Iterable[LinearFact]) -> tuple[StageShape, ...]:
    """The stages of one block, in order."""
    stages: dict[int, StageShape] = {}
    for linear in linears:
        before = stages.get(linear.stage)
        rows = (before.rows if before else 0) + linear.out_features
        stages[linear.stage] = StageShape(max(linear.in_features, before.in_features if before else 0), rows)
    return tuple(stages[number] for number in sorted(stages))


@dataclass(frozen=True, slots=True)
class WorkSet:
    """What working on one block needs beside the weights at home on the device."""

    solver_bytes: int = 0
    hessian_bytes: int = 0
    activation_bytes: int = 0
    packing_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.solver_bytes + self.hessian_bytes + self.activation_bytes + self.packing_bytes

    def __or__(self, other: WorkSet) -> WorkSet:
        """Enough for either."""
        return WorkSet(
            max(self.solver_bytes, other.solver_bytes),
            max(self.hessian_bytes, other.hessian_bytes),
            max(self.activation_bytes, other.activation_bytes),
            max(self.packing_bytes, other.packing_bytes),
        )


def micro_batch_tokens(work: Work) -> int:
    """Tokens of one micro-batch."""
    calibration = work.calibration
    if calibration.batch_size is not None:
        return min(calibration.batch_size, calibration.samples) * calibration.seq_len
    fitting = max(1, MICRO_BATCH_TOKENS // calibration.seq_len)
    return min(fitting, calibration.samples) * calibration.seq_len


def work_set(
    facts: ModelFacts, stages: tuple[StageShape, ...], work: Work | None, *, parked: bool
) -> WorkSet:
    """The bytes that quantizing one block of these stages needs; nothing where no work is planned."""
    if work is None or not stages:
        return WorkSet()
    config: QuantizeConfig = work.quantize
    t, b = micro_batch_tokens(work), facts.dtype_bytes
    tokens = work.calibration.samples * work.calibration.seq_len
    widest = max(stage.in_features for stage in stages)
    most_weights = max(stage.in_features * stage.rows for stage in stages)
    most_rows = max(stage.rows for stage in stages)
    in_flight = t * (FLIGHT_HIDDEN * facts.hidden_size + FLIGHT_INNER * most_rows) * b + 4 * t * widest
    squares = 4 * HESSIAN_COPIES * widest**2
    if not config.true_sequential:
        squares += 4 * sum(stage.in_features**2 for stage in stages) - 4 * widest**2
    activations = tokens * facts.hidden_size * b
    if parked and config.true_sequential:
        activations += tokens * widest * b
    return WorkSet(
        solver_bytes=max(4 * SOLVER_COPIES * most_weights, in_flight),
        hessian_bytes=squares,
        activation_bytes=activations,
        packing_bytes=5 * most_weights,
    )


def block_linears(facts: ModelFacts) -> dict[str, list[LinearFact]]:
    """Linears by block, in order."""
    by_block: dict[str, list[LinearFact]] = {block: [] for block in facts.blocks}
    for linear in facts.linears:
        by_block.setdefault(linear.block, []).append(linear)
    return by_block


def work_sets(facts: ModelFacts, work: Work | None, *, parked: bool) -> dict[str, WorkSet]:
    """The work set of every block."""
    known: dict[tuple[StageShape, ...], WorkSet] = {}
    found = {}
    for block, linears in block_linears(facts).items():
        stages = stages_of(linears)
        if stages not in known:
            known[stages] = work_set(facts, stages, work, parked=parked)
        found[block] = known[stages]
    return found


def packed_bytes(linear: LinearFact, config: QuantizeConfig) -> int:
    """Bytes of qweight, qzeros, scales and g_idx of one linear."""
    k, n, groups = linear.in_features, linear.out_features, config.groups(linear.in_features)
    words = -(-k * config.bits // 32) * n + groups * -(-n * config.bits // 32) + k
    return 4 * words + 2 * groups * n


def quantized_bytes(facts: ModelFacts, config: QuantizeConfig) -> int:
    """Bytes of all tensors of the checkpoint to be written."""
    weights = sum(linear.in_features * linear.out_features for linear in facts.linears)
    parameters = sum(tensor.size_bytes for tensor in facts.tensors if not tensor.buffer)
    return (
        parameters
        - weights * facts.dtype_bytes
        + sum(packed_bytes(linear, config) for linear in facts.linears)
    )


def host_bytes(facts: ModelFacts, work: Work | None) -> int:
    """Packed tensors that wait in main memory for their shard to fill."""
    if work is None:
        return 0
    return min(work.max_shard_bytes, sum(packed_bytes(linear, work.quantize) for linear in facts.linears))


def device_plans(placement: Placement, case: MapCase, *, parked: bool) -> tuple[DevicePlan, ...]:
    """One plan a device of the placement (and the CPU, which always does something), accelerators first."""
    facts = case.facts
    sets = work_sets(facts, case.work, parked=parked)
    weights = dict(placement.size_bytes)
    busy: dict[Device, WorkSet] = {}
    main = placement.main_device
    moved_block, moved_other = _moved_in(placement, facts)
    for block, needed in sets.items():
        home = _home(placement, block)
        at = main if home == CPU and main != CPU else home
        busy[at] = busy.get(at, WorkSet()) | needed
    plans = []
    for device in sorted({*weights, CPU}):
        if device.kind in ("disk", "meta"):
            continue
        budget = next((item for item in case.budgets if item.device == device), None)
        need = busy.get(device, WorkSet())
        working = need.solver_bytes
        if device == main:
            working = max(working + moved_block, moved_other)
        packing = need.packing_bytes + (host_bytes(facts, case.work) if device == CPU else 0)
        plans.append(
            DevicePlan(
                device=str(device),
                total_bytes=budget.total_bytes if budget else 0,
                free_bytes=budget.free_bytes if budget else 0,
                limit_bytes=case.limit(device) or 0,
                weights_bytes=weights.get(device, 0),
                working_bytes=working,
                hessian_bytes=need.hessian_bytes,
                activation_bytes=need.activation_bytes,
                packing_bytes=packing,
                baseline_bytes=CPU_BASELINE_BYTES if device == CPU else ACCELERATOR_BASELINE_BYTES,
            )
        )
    return tuple(plans)


def _moved_in(placement: Placement, facts: ModelFacts) -> tuple[int, int]:
    """Bytes of the largest block, and of the largest other entry, that are lent to the main device."""
    blocks, offloaded = frozenset(facts.blocks), frozenset(placement.offloaded)
    sizes = [
        (entry.name in blocks, entry.size_bytes) for entry in placement.entries if entry.name in offloaded
    ]
    largest_block = max((size for is_block, size in sizes if is_block), default=0)
    largest_other = max((size for is_block, size in sizes if not is_block), default=0)
    return largest_block, largest_other


def _home(placement: Placement, block: str) -> Device:
    """The device of a block; for a block that a rule split, the device of its first part."""
    for entry in placement.entries:
        if (
            entry.name in ("", block)
            or block.startswith(entry.name + ".")
            or entry.name.startswith(block + ".")
        ):
            return entry.device
    return placement.main_device
