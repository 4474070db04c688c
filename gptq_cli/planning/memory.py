"""How many bytes each device must hold at its highest moment.

For a device that works on blocks (T = samples · seq_len tokens, t = tokens of one micro-batch, b = bytes of a
number in the model's dtype, h = hidden size; a stage has K input columns and R = ΣN rows):

    weights      every parameter and buffer that lives there; in a plain CPU run, where blocks are read when
                 their turn comes, those outside the blocks and one block
    activations  T · h · b, the inputs of the block, which its outputs replace micro-batch by micro-batch;
                 where the model's own forwards are kept open between the blocks (`engine.driven`)
                 T · OPEN_HIDDEN · h · b;
                 with parked forwards also what their frames hold between two stages: the normed input and
                 the widest K, or the outputs of the first stage and the K of the second: T · (h + …) · b;
                 on the cpu twice that where one piece is less than HEAP_PIECE_BYTES: small pieces live on the
                 C heap, and what is freed between them stays resident
    and the largest of these moments, over all stages of the block:
        collect  Hessian   4 · K²
                 working   t · (IN_FLIGHT_HIDDEN · h + IN_FLIGHT_ROWS · max R) · b: a micro-batch on its way,
                           and CHUNK_BYTES: activations widened to fp32
        solve    Hessian   8 · K²: H and the factor of the damped H
                 working   SOLVE_BYTES · R · K: weights, errors and their copy in original order, in fp32
        pack     Hessian   4 · K²
                 packing   PACK_BYTES · R · K: codes, what is left of the solve, words
    experts, which see the tokens routed to them, are collected in batches of c, with one H for the tokens of
    all, and e of them are solved side by side (c and e: `experts_per_batch` and `experts_per_solve`):
        collect  Hessian   (c + 1) · 4 · K²
        solve    Hessian   (c + 1 + e + 1) · 4 · K²: the H of e of them copied side by side, a factor each
                 working   SOLVE_BYTES · e · R · K
        pack     packing   (PACK_BYTES + CODE_BYTES · (e - 1)) · R · K
    without true-sequential stages the H of every other stage of the block is there at once: 4 · ΣK²
    solving for the dense model's output (`solve_for`): activations of the share of the samples that is run
    twice, a dense copy of the block's linears, four moments of K² numbers instead of H, and one more moment:
        goal     Hessian   GOAL_SQUARES · 4 · K²: four moments, H and a factor
                 working   GOAL_BYTES · R · K; and 4 · R · K for the goals while solving
    working also counts what is moved in from the cpu: the largest offloaded block; or, if that is more than
    all of the above, an embedding or head; on the cpu also the codes and values of the largest weight that is
    stored in few bits, because it is decoded there
    a quantized head is one more moment on its device: its Hessian, and HEAD_ROWS of its rows at a time
    baseline     interpreter and libraries (cpu), or device context and allocator slack (accelerator)

Micro-batch, parked or replayed, and where a block is worked on are read from the `Schedule`. The constants
were measured (docs/rules.md says how); each run's report sets prediction beside measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.names import parents
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import HEAD_ROWS, SOLVE_BYTES, BlockSchedule, Schedule
from gptq_cli.planning.cases import MapCase, Work
from gptq_cli.planning.schedule import StageShape, block_stages, expert_families
from gptq_cli.results.map import DevicePlan

MIB = 1 << 20
PACK_BYTES = 10
CODE_BYTES = 2
GOAL_BYTES = 16
GOAL_SQUARES = 6
IN_FLIGHT_HIDDEN = 6
IN_FLIGHT_ROWS = 2
OPEN_HIDDEN = 2
"""Hidden states that a forward of the model holds which is kept open between the blocks: those that enter the
block, and the embeddings."""
CHUNK_BYTES = 128 * MIB
HEAP_PIECE_BYTES = 4 * MIB
"""What glibc's heap is made to hand out for itself, see `devices.host_memory.limit_malloc_arenas`."""
CPU_BASELINE_BYTES = 450 * MIB
"""Resident set of the interpreter with torch, transformers and accelerate imported and a tokenizer loaded."""
ACCELERATOR_BASELINE_BYTES = 768 * MIB
"""Device context, library workspaces, and what the caching allocator cannot hand out again."""


@dataclass(frozen=True, slots=True)
class WorkSet:
    """What working on one block needs beside the weights that rest on the device, at the largest moment."""

    working_bytes: int = 0
    hessian_bytes: int = 0
    packing_bytes: int = 0
    activation_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All four parts."""
        return self.working_bytes + self.hessian_bytes + self.packing_bytes + self.activation_bytes


def work_set(
    facts: ModelFacts,
    stages: tuple[StageShape, ...],
    work: Work,
    block: BlockSchedule,
    micro_batch_tokens: int,
) -> WorkSet:
    """The bytes that quantizing one block of these stages needs."""
    if not stages:
        return WorkSet()
    t, b = micro_batch_tokens, facts.dtype_bytes
    tokens = work.calibration.samples * work.calibration.seq_len
    dense = work.quantize.solve_for == "dense"
    samples = work.calibration.samples
    streams = 1 + work.quantize.paired_samples(samples) / samples
    held = facts.hidden_size * (OPEN_HIDDEN if facts.between else 1)
    held += _parked_numbers(facts, stages) if block.parked else 0
    activations = int(streams * tokens * b * held)
    copy = b * sum(stage.in_features * stage.rows for stage in stages) if dense else 0
    flight = (
        t * b * (IN_FLIGHT_HIDDEN * facts.hidden_size + IN_FLIGHT_ROWS * max(stage.rows for stage in stages))
    )
    kept = 4 if dense else 1
    once = [stage for stage in stages if not stage.routed]
    squares = sum(4 * stage.in_features**2 for stage in once)
    moments = []
    for stage, count in expert_families(stages).items():
        widened = min(CHUNK_BYTES, 4 * t * stage.in_features)
        moments += _expert_moments(stage, count, block, copy, flight + widened, activations)
    for stage in once:
        weights, square = stage.rows * stage.in_features, 4 * stage.in_features**2
        others = 0 if work.quantize.true_sequential else kept * (squares - square)
        widened = min(CHUNK_BYTES, 4 * t * stage.in_features)
        solving = (SOLVE_BYTES + (4 if dense else 0)) * weights
        moments += [
            WorkSet(copy + flight + widened, others + kept * square, 0, activations),
            WorkSet(copy + solving, others + 2 * square, 0, activations),
            WorkSet(copy, others + square, PACK_BYTES * weights, activations),
        ]
        if dense:
            moments.append(
                WorkSet(copy + GOAL_BYTES * weights, others + GOAL_SQUARES * square, 0, activations)
            )
    return max(moments, key=lambda moment: moment.total_bytes)


def _expert_moments(
    stage: StageShape, count: int, block: BlockSchedule, copy: int, flight: int, activations: int
) -> list[WorkSet]:
    """The moments of `count` experts of one kind: collected in batches, solved side by side."""
    weights, square = stage.rows * stage.in_features, 4 * stage.in_features**2
    collected = min(count, block.experts_per_batch(stage.in_features))
    together = min(collected, block.experts_per_solve(stage.in_features, stage.rows))
    held = (collected + 1) * square
    packing = (PACK_BYTES + CODE_BYTES * (together - 1)) * weights
    return [
        WorkSet(copy + flight, held, 0, activations),
        WorkSet(copy + SOLVE_BYTES * together * weights, held + (together + 1) * square, 0, activations),
        WorkSet(copy, held, packing, activations),
    ]


def _parked_numbers(facts: ModelFacts, stages: tuple[StageShape, ...]) -> int:
    """Numbers per token that the frames of parked forwards hold beside the residual, at the widest stage."""
    widest = max(stage.in_features for stage in stages)
    attention = stages[1].in_features + stages[0].rows if len(stages) > 1 else 0
    return facts.hidden_size + max(widest, attention)


def work_sets(facts: ModelFacts, work: Work, schedule: Schedule) -> dict[str, WorkSet]:
    """The work set of every block."""
    known: dict[tuple[tuple[StageShape, ...], bool, int], WorkSet] = {}
    found = {}
    for name, stages in block_stages(facts).items():
        block = schedule.block(name)
        key = (stages, block.parked, block.expert_batch_bytes)
        if key not in known:
            known[key] = work_set(facts, stages, work, block, schedule.micro_batch_tokens)
        found[name] = known[key]
    return found


def packed_bytes(linear: LinearFact, config: QuantizeConfig) -> int:
    """Bytes of qweight, qzeros, scales and g_idx of one linear. `config`: that of the whole model."""
    config = config.of_linear(linear.name)
    k, n, groups = linear.in_features, linear.out_features, config.groups(linear.in_features)
    words = -(-k * config.bits // 32) * n + groups * -(-n * config.bits // 32) + k
    return 4 * words + 2 * groups * n


def quantized_bytes(facts: ModelFacts, config: QuantizeConfig) -> int:
    """Bytes of all tensors of the checkpoint to be written."""
    config = Work(config, CalibrationConfig()).on(facts).quantize
    replaced = (
        facts.linears if facts.head_is_tied else facts.packed
    )  # a tied head's weight is the embedding's
    weights = sum(linear.in_features * linear.out_features for linear in replaced)
    parameters = sum(tensor.size_bytes for tensor in facts.tensors if not tensor.buffer)
    return (
        parameters
        - weights * facts.dtype_bytes
        + sum(packed_bytes(linear, config) for linear in facts.packed)
    )


def snapshot_bytes(facts: ModelFacts, work: Work) -> int:
    """Bytes of the hidden states of all samples, in both streams; 0 where they live inside open forwards, of
    which there are no snapshots."""
    if facts.between:
        return 0
    samples = work.calibration.samples
    both = samples + work.quantize.paired_samples(samples)
    return both * work.calibration.seq_len * facts.hidden_size * facts.dtype_bytes


def device_plans(placement: Placement, case: MapCase, schedule: Schedule | None) -> tuple[DevicePlan, ...]:
    """One plan per device of the placement (and the CPU, which always does something), accelerators first.

    `schedule` None: no work is planned, only the weights count.
    """
    facts = case.facts
    weights = dict(placement.size_bytes)
    if schedule is not None and placement.streams_blocks:
        weights[CPU] = _streamed_bytes(facts)
    main = placement.main_device
    moved_block, moved_other = _moved_in(placement, facts)
    busy = _busiest(facts, case.work, schedule)
    plans = []
    for device in sorted({*weights, CPU}):
        budget = next((item for item in case.budgets if item.device == device), None)
        if device.kind in ("disk", "meta") or (budget is None and device not in weights):
            continue
        need = busy.get(device, WorkSet())
        scattered = device == CPU and schedule is not None and _scattered(schedule, facts)
        working = need.working_bytes
        if device == CPU and facts.decoded is not None:
            working = max(working, facts.decoded.working_bytes)
        if device == main:
            working += max(moved_block, moved_other - need.total_bytes)
        plans.append(
            DevicePlan(
                device=str(device),
                total_bytes=budget.total_bytes if budget else 0,
                free_bytes=budget.free_bytes if budget else 0,
                limit_bytes=case.limit(device) or 0,
                weights_bytes=weights.get(device, 0),
                working_bytes=working,
                hessian_bytes=need.hessian_bytes,
                activation_bytes=need.activation_bytes * (2 if scattered else 1),
                packing_bytes=need.packing_bytes,
                baseline_bytes=CPU_BASELINE_BYTES if device == CPU else ACCELERATOR_BASELINE_BYTES,
            )
        )
    return tuple(plans)


def head_work_set(facts: ModelFacts, head: LinearFact, work: Work, micro_batch_tokens: int) -> WorkSet:
    """The bytes that quantizing the head needs: its rows are solved `HEAD_ROWS` at a time."""
    b, k = facts.dtype_bytes, head.in_features
    tokens = work.calibration.samples * work.calibration.seq_len
    weights, square = min(head.out_features, HEAD_ROWS) * k, 4 * k**2
    flight = micro_batch_tokens * b * IN_FLIGHT_HIDDEN * facts.hidden_size
    widened = min(CHUNK_BYTES, 4 * micro_batch_tokens * k)
    stored = 2 * packed_bytes(head, work.quantize)  # the pieces, and the whole that is made of them
    moments = (
        WorkSet(flight + widened, square, 0, tokens * b * facts.hidden_size),
        WorkSet(SOLVE_BYTES * weights, 2 * square, stored, 0),
        WorkSet(0, square, stored + PACK_BYTES * weights, 0),
    )
    return max(moments, key=lambda moment: moment.total_bytes)


def _busiest(facts: ModelFacts, work: Work | None, schedule: Schedule | None) -> dict[Device, WorkSet]:
    """The largest work set on each device that works on blocks, or on the head."""
    busy: dict[Device, WorkSet] = {}
    if work is None or schedule is None:
        return busy
    for name, needed in work_sets(facts, work, schedule).items():
        device = schedule.block(name).execution_device
        busy[device] = max(busy.get(device, needed), needed, key=lambda one: one.total_bytes)
    if facts.head is not None and schedule.head_device is not None:
        device, needed = (
            schedule.head_device,
            head_work_set(facts, facts.head, work, schedule.micro_batch_tokens),
        )
        busy[device] = max(busy.get(device, needed), needed, key=lambda one: one.total_bytes)
    return busy


def _streamed_bytes(facts: ModelFacts) -> int:
    """Weights that are there at once where blocks come one by one: the largest, and what lies outside."""
    blocks = dict.fromkeys(facts.blocks, 0)
    outside = 0
    for tensor in facts.tensors:
        block = next((name for name in parents(tensor.name) if name in blocks), None)
        if block is None:
            outside += tensor.size_bytes
        else:
            blocks[block] += tensor.size_bytes
    return outside + max(blocks.values(), default=0)


def _scattered(schedule: Schedule, facts: ModelFacts) -> bool:
    """True where hidden states come in pieces small enough for the C heap, and memory is not so short that
    forwards are replayed: then the holes between pieces are filled again."""
    piece = schedule.micro_batch_tokens * facts.hidden_size * facts.dtype_bytes
    return piece < HEAP_PIECE_BYTES and any(block.replayed != "memory" for block in schedule.blocks)


def _moved_in(placement: Placement, facts: ModelFacts) -> tuple[int, int]:
    """Bytes of the largest block, and of the largest other entry, that are moved in to the main device."""
    blocks, offloaded = frozenset(facts.blocks), frozenset(placement.offloaded)
    sizes = [
        (entry.name in blocks, entry.size_bytes) for entry in placement.entries if entry.name in offloaded
    ]
    largest_block = max((size for is_block, size in sizes if is_block), default=0)
    largest_other = max((size for is_block, size in sizes if not is_block), default=0)
    return largest_block, largest_other
