"""Making the schedule of a run: micro-batches, which forwards are parked, where a block is worked on.

This is the only place that decides these things. `planning.memory` and `planning.time` read the schedule to
say what it costs, the planner tries several and keeps the first that fits, and the engine obeys it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.names import fold
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import BlockSchedule, ReplayReason, Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.share import most_in_a_leaf
from gptq_cli.ranks.leaves import LEAVES

MICRO_BATCH_TOKENS = 2048
"""Tokens of a micro-batch on a CPU, where more are no faster, and the fewest that a plan takes elsewhere."""
KNEE_TOKENS = 16384
"""Tokens beyond which a micro-batch on an accelerator is taken to gain nothing: its matmuls are long enough
to fill the device. To be measured on a card; until then an assumption."""
EXPERT_BATCH_BYTES = 512 << 20
"""Hessians of an expert batch: one of 7168 columns has 196 MiB, one of 2048 has 16."""

SOLVE_BATCH_ROWS = 4096
"""Rows of experts that a CPU solves side by side: more no longer fit its cache (scripts/bench_experts.py)."""
ACCELERATOR_SOLVE_BATCH_ROWS = 65536
"""The same for an accelerator, whose kernels take about as long for few rows as for many. To be measured."""


@dataclass(frozen=True, slots=True)
class Way:
    """How much memory a run may take to be fast."""

    parked: bool
    """Forwards are kept parked, in blocks that allow it."""
    on_host: bool
    """Hidden states rest in main memory, for blocks on accelerators whose forwards are replayed."""
    reads_ahead: bool
    expert_batches: int = 1
    """Batches of experts for each one of the usual size: their Hessians take that much less."""


WAYS = (
    Way(parked=True, on_host=False, reads_ahead=True),
    Way(parked=True, on_host=False, reads_ahead=False),
    Way(parked=False, on_host=False, reads_ahead=True),
    Way(parked=False, on_host=False, reads_ahead=False),
    Way(parked=False, on_host=True, reads_ahead=True),
    Way(parked=False, on_host=True, reads_ahead=False),
    Way(parked=False, on_host=True, reads_ahead=False, expert_batches=4),
    Way(parked=False, on_host=True, reads_ahead=False, expert_batches=16),
)
"""The fastest first: parking saves two forwards in three, reading ahead the time of the disk, and hidden
states that travel cost the least time but are needed the least. Each batch of experts runs the forwards
again; the sums that several ranks keep beside each Hessian may leave room for smaller ones only. The last way
is the leanest."""


@dataclass(frozen=True, slots=True)
class StageShape:
    """A stage reduced to what costs memory: `rows` = ΣN of its linears over `in_features` = K columns."""

    in_features: int
    rows: int
    family: str = ""
    """For experts, which are collected and solved in batches: the name that they have in common; else ""."""
    alone: bool = True
    """It is of a single linear."""
    outputs: tuple[int, ...] = ()
    """N of each linear that runs once per token and has a weight of its own, see `planning.fisher`."""
    together: bool = False
    """Of an expert that holds a row for every token, whatever the routing."""

    @property
    def routed(self) -> bool:
        """True for experts."""
        return bool(self.family)


def expert_families(stages: Iterable[StageShape]) -> Counter[StageShape]:
    """How many experts of each kind a block has; a kind is their shape and the name in common."""
    return Counter(stage for stage in stages if stage.routed)


def stages_of(linears: Iterable[LinearFact]) -> tuple[StageShape, ...]:
    """The stages of one block, in order."""
    stages: dict[int, StageShape] = {}
    for linear in linears:
        before = stages.get(linear.stage)
        rows = (before.rows if before else 0) + linear.out_features
        family = before.family if before else fold(linear.name) if linear.routed else ""
        own = () if linear.routed or linear.part_of else (linear.out_features,)
        stages[linear.stage] = StageShape(
            max(linear.in_features, before.in_features if before else 0),
            rows,
            family,
            alone=before is None,
            outputs=(*(before.outputs if before else ()), *own),
            together=linear.together,
        )
    return tuple(stages[number] for number in sorted(stages))


def block_linears(facts: ModelFacts) -> dict[str, list[LinearFact]]:
    """Linears by block, in order."""
    return _by_block(facts.blocks, facts.linears)


def _by_block(blocks: Iterable[str], linears: Iterable[LinearFact]) -> dict[str, list[LinearFact]]:
    by_block: dict[str, list[LinearFact]] = {block: [] for block in blocks}
    for linear in linears:
        by_block.setdefault(linear.block, []).append(linear)
    return by_block


def block_stages(facts: ModelFacts) -> Mapping[str, tuple[StageShape, ...]]:
    """The stages of every block, in order."""
    return _block_stages(facts.blocks, facts.linears)


@lru_cache(maxsize=4)  # a plan asks for each of many placements of one model
def _block_stages(
    blocks: tuple[str, ...], linears: tuple[LinearFact, ...]
) -> Mapping[str, tuple[StageShape, ...]]:
    found = _by_block(blocks, linears)
    return MappingProxyType({block: stages_of(inside) for block, inside in found.items()})


@lru_cache(maxsize=4)
def _routed_blocks(linears: tuple[LinearFact, ...]) -> frozenset[str]:
    return frozenset(linear.block for linear in linears if linear.routed)


def make_schedule(placement: Placement, facts: ModelFacts, work: Work, way: Way) -> Schedule:
    """The schedule for a placement, with the smallest micro-batch that a plan chooses by itself."""
    routed = _routed_blocks(facts.linears)
    direct = not facts.between  # else the model's own forwards hold their hidden states where they run

    def replayed(block: str) -> ReplayReason | None:
        if not work.quantize.true_sequential:
            return "not-sequential"
        if block in routed:
            return "experts"
        return None if way.parked else "memory"

    def made(block: str) -> BlockSchedule:
        storage, why = storage_device(placement, block), replayed(block)
        device = execution_device(placement, storage)
        return BlockSchedule(
            name=block,
            storage_device=None if placement.streams(block) else storage,
            execution_device=device,
            replayed=why,
            expert_batch_bytes=EXPERT_BATCH_BYTES // (way.expert_batches if block in routed else 1),
            solve_batch_rows=_solve_batch_rows(device),
            activations_on_host=way.on_host and direct and why is not None and device.is_accelerator,
        )

    return Schedule(
        micro_batch_samples=micro_batch_samples(work),
        seq_len=work.calibration.seq_len,
        head_device=head_device(placement, facts),
        reads_ahead=way.reads_ahead,
        blocks=tuple(made(block) for block in facts.blocks),
    )


def _solve_batch_rows(device: Device) -> int:
    return ACCELERATOR_SOLVE_BATCH_ROWS if device.is_accelerator else SOLVE_BATCH_ROWS


def wider_micro_batches(placement: Placement, work: Work) -> tuple[int, ...]:
    """Samples of the micro-batches to try instead of the smallest, widest first; () where that is settled."""
    if work.calibration.batch_size is not None or not placement.main_device.is_accelerator:
        return ()
    halvings = (KNEE_TOKENS // MICRO_BATCH_TOKENS).bit_length() - 1
    tried = dict.fromkeys(micro_batch_samples(work, KNEE_TOKENS >> step) for step in range(halvings))
    return tuple(tried)


def wider_expert_batches(placement: Placement, facts: ModelFacts, work: Work) -> tuple[int, ...]:
    """Bytes of the expert batches to try instead of the usual ones, largest first; () for one process on a
    CPU.

    Each batch takes a pass of all samples. And experts of a batch are dealt out, so it should have several
    for each of `LEAVES` ranks: for fewer ranks as well, since the pool that experts share grows batch by
    batch, and codes must not depend on how many ranks there are.
    """
    widest = max((linear.in_features for linear in facts.linears if linear.routed), default=0)
    if not widest or not (work.ranks or placement.main_device.is_accelerator):
        return ()
    sizes = (LEAVES * each * 4 * widest**2 for each in (4, 2, 1))
    return tuple(size for size in sizes if size > EXPERT_BATCH_BYTES)


def micro_batch_samples(work: Work, tokens: int = MICRO_BATCH_TOKENS) -> int:
    """As many whole samples as make `tokens`, at least one; or as `CalibrationConfig.batch_size` says. Of
    several ranks no more than there are in a leaf, across which no micro-batch goes."""
    calibration = work.calibration
    wanted = calibration.batch_size
    if wanted is None:
        wanted = max(1, tokens // calibration.seq_len)
    return max(1, min(wanted, most_in_a_leaf(work)))


def execution_device(placement: Placement, storage: Device) -> Device:
    """Where a block that rests on `storage` is worked on: offloaded blocks visit the main device."""
    return placement.main_device if storage == CPU else storage


def head_device(placement: Placement, facts: ModelFacts) -> Device | None:
    """Where a quantized head is worked on; None where it stays dense."""
    if facts.head is None:
        return None
    weight = f"{facts.head.name}.weight"
    tied = next((group for group in facts.tied if weight in group), (weight,))
    stored = {tensor.name for tensor in facts.tensors}  # a tied tensor is listed under its first name
    first = next((name for name in tied if name in stored), weight)
    return execution_device(placement, placement.device_of(first))


def storage_device(placement: Placement, block: str) -> Device:
    """The device of a block; for a block that a rule split, the device of its first part."""
    for entry in placement.entries:
        if (
            entry.name in ("", block)
            or block.startswith(entry.name + ".")
            or entry.name.startswith(block + ".")
        ):
            return entry.device
    return placement.main_device
