"""What each device must hold at its highest moment: the weights that are there at once, and the work.

    weights      one block, the largest of those that are read there when their turn comes; blocks that the
                 map has rest on the cpu beside accelerators; and what lies outside the blocks and is computed
                 with. That leaves after capture, unless the model's own forward runs again later
                 (`engine.driven`, a quantized head), or the map has it rest on the cpu
    next block   in main memory: the bytes of the largest block as they are stored, where they are read ahead,
                 else one buffer on the way to an accelerator
    work         the `WorkSet` of the block that needs most, see memory.py. Hidden states that rest in main
                 memory count there, rounded up as pinned memory is; so do packed tensors on their way to the
                 disk, at most PENDING_BYTES or a block's, of the rank that writes
    baseline     interpreter and libraries (cpu), or device context and allocator slack (accelerator)

Other moments may be higher, and then count as working memory: capture, with all that lies outside the
blocks, the largest module among it that is brought in from the cpu, and the hidden states; the look at a
tensor that stays in the files; of several ranks the first one's, when it has the hidden states of all in
main memory to write a snapshot; the pass that takes gradients (fisher.py); and tuning (tuning.py). Weights in
few bits are decoded where they are worked on, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.names import parents
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import PENDING_BYTES, Schedule
from gptq_cli.planning.cases import MapCase, Work
from gptq_cli.planning.fisher import gradient_tokens, pass_bytes, state_bytes
from gptq_cli.planning.memory import (
    ACCELERATOR_BASELINE_BYTES,
    IN_FLIGHT_HIDDEN,
    MIB,
    OPEN_HIDDEN,
    WorkSet,
    cpu_baseline_bytes,
    head_work_set,
    packed_bytes,
    sample_bytes,
    work_sets,
)
from gptq_cli.planning.schedule import block_linears
from gptq_cli.planning.share import own_samples, samples_of_ranks
from gptq_cli.planning.tuning import tuning_bytes
from gptq_cli.results.map import DevicePlan

HEAP_PIECE_BYTES = 4 * MIB
"""What glibc's heap is made to hand out for itself, see `devices.host_memory.limit_malloc_arenas`."""
BUFFER_BYTES = 64 * MIB
"""A buffer on the way to an accelerator, see `devices.host_buffers`."""


@dataclass(slots=True)
class Weights:
    """Bytes of weights on one device."""

    streamed: int = 0
    """The largest block that is read there when its turn comes."""
    blocks: int = 0
    """Blocks that rest there."""
    outside: int = 0
    """What lies outside the blocks and is computed with."""
    moved_block: int = 0
    """The largest block that is brought in from the cpu."""
    moved_module: int = 0
    """The largest other module that is."""


def weights_on(placement: Placement, facts: ModelFacts) -> dict[Device, Weights]:
    """The weights of each device of the placement, and of the cpu."""
    found = {device: Weights() for device in (*placement.devices, CPU)}
    main = found[placement.main_device]
    names = frozenset(facts.blocks)
    blocks: dict[str, dict[Device, int]] = {}
    modules: dict[str, int] = {}
    for tensor in facts.tensors:
        device = placement.device_of(tensor.name)
        block = next((name for name in parents(tensor.name) if name in names), None)
        if block is not None:  # all of it on one device, or preflight refuses it
            on = blocks.setdefault(block, {})
            on[device] = on.get(device, 0) + tensor.size_bytes
        elif tensor.name not in facts.uncalled:
            found[device].outside += tensor.size_bytes
            moved = next((n for n in (tensor.name, *parents(tensor.name)) if n in placement.offloaded), None)
            if moved is not None:
                modules[moved] = modules.get(moved, 0) + tensor.size_bytes
    main.moved_module = max(modules.values(), default=0)
    for block, sizes in blocks.items():
        streamed = placement.streams(block)
        for device, size_bytes in sizes.items():
            if streamed:
                found[device].streamed = max(found[device].streamed, size_bytes)
            else:
                found[device].blocks += size_bytes
                main.moved_block = max(main.moved_block, size_bytes)
    return found


def device_plans(placement: Placement, case: MapCase, schedule: Schedule | None) -> tuple[DevicePlan, ...]:
    """One plan per device of the placement (and the CPU, which always does something), accelerators first.

    `schedule` None: no work is planned, only the weights count.
    """
    resting = dict(placement.size_bytes)
    moments = None if schedule is None or case.work is None else _Moments(placement, case, schedule)
    on_cpu = cpu_baseline_bytes(case.facts)
    plans = []
    for device in sorted({*resting, CPU}):
        budget = next((item for item in case.budgets if item.device == device), None)
        if device.kind in ("disk", "meta") or (budget is None and device not in resting):
            continue
        need = WorkSet() if moments is None else moments.work(device)
        plans.append(
            DevicePlan(
                device=str(device),
                total_bytes=budget.total_bytes if budget else 0,
                free_bytes=budget.free_bytes if budget else 0,
                limit_bytes=case.limit(device) or 0,
                weights_bytes=resting.get(device, 0) if moments is None else moments.weights_bytes(device),
                ahead_bytes=0 if moments is None else moments.ahead_bytes(device),
                working_bytes=need.working_bytes,
                hessian_bytes=need.hessian_bytes,
                activation_bytes=need.activation_bytes,
                packing_bytes=need.packing_bytes,
                baseline_bytes=on_cpu if device == CPU else ACCELERATOR_BASELINE_BYTES,
            )
        )
    return tuple(plans)


class _Moments:
    """What there is on the devices of one planned run."""

    def __init__(self, placement: Placement, case: MapCase, schedule: Schedule) -> None:
        assert case.work is not None
        self._placement, self._schedule = placement, schedule
        self._facts, self._work = case.facts, case.work
        self._weights = weights_on(placement, case.facts)
        self._busy = _busiest(case.facts, case.work, schedule)
        self._leaves = not case.facts.between and case.facts.head is None
        self._streams = any(block.storage_device is None for block in schedule.blocks)

    def weights_bytes(self, device: Device) -> int:
        """While a block is worked on."""
        held = self._weights.get(device, Weights())
        stays = not self._leaves or (device == CPU and bool(self._placement.offloaded))
        return held.streamed + held.blocks + (held.outside if stays else 0)

    def ahead_bytes(self, device: Device) -> int:
        """The next block in main memory."""
        if device != CPU or not self._streams:
            return 0
        accelerated = self._placement.main_device.is_accelerator
        if not self._schedule.reads_ahead:
            return BUFFER_BYTES if accelerated else 0
        largest = max(held.streamed for held in self._weights.values())
        stored = int(largest * _stored_share(self._facts))
        return -(-stored // BUFFER_BYTES) * BUFFER_BYTES if accelerated else stored

    def work(self, device: Device) -> WorkSet:
        """Beside the weights and the next block."""
        held, need = self._weights.get(device, Weights()), self._busy.get(device, WorkSet())
        activations = need.activation_bytes
        if device == CPU:
            activations *= 2 if _scattered(self._schedule, self._facts) else 1
            activations += self._activations_on_host()
        packing = need.packing_bytes + (self._pending_bytes() if device == CPU else 0)
        working = need.working_bytes
        if self._facts.decoded is not None and (held.streamed or held.outside or device == CPU):
            working = max(working, self._facts.decoded.working_bytes)
        rest = WorkSet(0, need.hessian_bytes, packing, activations).total_bytes
        there = self.weights_bytes(device) + self.ahead_bytes(device) + rest
        working += max(held.moved_block, max(self._others(device, held), default=0) - there - working, 0)
        return WorkSet(working, need.hessian_bytes, packing, activations)

    def _pending_bytes(self) -> int:
        """Packed tensors on their way to the disk; all of a block's have arrived when it is finished."""
        if self._work.rank:
            return 0
        config, largest = self._work.on(self._facts).quantize, 0
        for linears in block_linears(self._facts).values():
            size = 0
            for linear in linears:
                size += packed_bytes(linear, config)
                if size >= PENDING_BYTES:
                    return PENDING_BYTES
            largest = max(largest, size)
        return largest

    def _others(self, device: Device, held: Weights) -> Iterator[int]:
        """What is there at the other moments that may be the highest."""
        facts, schedule = self._facts, self._schedule
        first = schedule.blocks[0] if schedule.blocks else None
        captured = 0
        if first is not None and first.activation_device == device:
            captured = own_samples(self._work).all * sample_bytes(facts, self._work)
            captured *= OPEN_HIDDEN if facts.between else 1
            captured += state_bytes(facts, self._work)  # once more, to know how blocks are called
        if held.outside or held.moved_module:
            flight = IN_FLIGHT_HIDDEN * schedule.micro_batch_tokens * facts.hidden_size * facts.dtype_bytes
            yield held.outside + held.blocks + held.moved_module + captured + flight
        if device == CPU:
            yield max((t.size_bytes for t in facts.tensors if t.name in facts.uncalled), default=0)
            yield self._snapshot_bytes()
        if gradient_tokens(self._work):
            blocks = held.streamed + held.blocks + held.moved_block + self.ahead_bytes(device)
            yield pass_bytes(facts, self._work, self._placement, schedule, device, blocks)
        if self._work.quantize.tune_epochs:
            yield tuning_bytes(facts, self._work, self._placement, schedule, device)

    def _snapshot_bytes(self) -> int:
        """In main memory while the first of several ranks writes the hidden states of all."""
        facts, work = self._facts, self._work
        if work.ranks < 2 or work.rank or facts.between:
            return 0
        here = any(block.activation_device == CPU for block in self._schedule.blocks)
        own = own_samples(work).held * sample_bytes(facts, work) if here else 0
        there = self.weights_bytes(CPU) + self.ahead_bytes(CPU) + own
        return there + sum(one.held for one in samples_of_ranks(work)) * sample_bytes(facts, work)

    def _activations_on_host(self) -> int:
        """Hidden states that rest in main memory while an accelerator works."""
        there = [block for block in self._schedule.blocks if block.activations_on_host]
        if not there:
            return 0
        held = own_samples(self._work).held * sample_bytes(self._facts, self._work)
        piece = self._schedule.micro_batch_tokens * self._facts.hidden_size * self._facts.dtype_bytes
        rounded = 1 << max(0, piece - 1).bit_length()
        return int(held * rounded / max(1, piece))


def _busiest(facts: ModelFacts, work: Work, schedule: Schedule) -> dict[Device, WorkSet]:
    """The largest work set on each device that works on blocks, or on the head."""
    busy: dict[Device, WorkSet] = {}

    def count(device: Device, needed: WorkSet) -> None:
        busy[device] = max(busy.get(device, needed), needed, key=lambda one: one.total_bytes)

    for name, needed in work_sets(facts, work, schedule).items():
        count(schedule.block(name).execution_device, needed)
    if facts.head is not None and schedule.head_device is not None:
        count(schedule.head_device, head_work_set(facts, facts.head, work, schedule.micro_batch_tokens))
    return busy


def _stored_share(facts: ModelFacts) -> float:
    """Bytes in the files for each byte of the model's dtype."""
    left_out = sum(part.parameters for part in facts.beside if not part.in_class) * facts.dtype_bytes
    here = left_out + sum(tensor.size_bytes for tensor in facts.tensors if not tensor.buffer)
    return facts.tensor_files_bytes / here if facts.tensor_files_bytes and here else 1.0


def _scattered(schedule: Schedule, facts: ModelFacts) -> bool:
    """True where hidden states come in pieces small enough for the C heap, and memory is not so short that
    forwards are replayed: then the holes between pieces are filled again."""
    piece = schedule.micro_batch_tokens * facts.hidden_size * facts.dtype_bytes
    return piece < HEAP_PIECE_BYTES and any(block.replayed != "memory" for block in schedule.blocks)
