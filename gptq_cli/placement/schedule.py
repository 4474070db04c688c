"""How a run is carried out: decided once, with the plan, and obeyed by the engine.

A `Schedule` changes how fast a run is and how much memory it takes, not what is computed (up to the order in
which sums are rounded). It is made by `planning.schedule` and read by everything that needs to know: the
memory budget, the time estimate, the job's header, report.json, and the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from gptq_cli.placement.device import CPU, Device

ReplayReason = Literal["memory", "experts", "not-sequential"]
"""Why the forwards of a block are replayed: no room to keep them parked, linears that see a part of the
tokens, or stages that are all collected in one pass (`true_sequential` off)."""


SOLVE_BYTES = 14
"""Of the solve, for every weight: weights, errors and their copy in original order, in fp32, and codes."""
HEAD_ROWS = 16_384
"""Rows of an output head that are solved at a time; a multiple of 32, so that pieces fill whole words."""

PENDING_BYTES = 128 << 20
"""Packed tensors that are on their way to the disk at a time, or one."""

TUNE_STEP_TOKENS = 2048
"""Tokens of one step of tuning, at least a sample."""
TUNE_HELD_OUT = 8
"""Every so many samples one takes no part in tuning, and decides what becomes of it."""
TUNE_LOGITS = 1 << 24
"""Numbers of logits that are made at a time while a model is tuned."""


PANEL_ROWS = 4096
"""Rows of a linear whose outputs are looked at together, at most (`gptq.feedback`)."""
PART_ROWS, PARTS = 64, 16
"""Rows that are solved side by side, at least; and into how many parts a linear is cut, about, at most."""


def panel_rows(rows: int) -> int:
    """Rows of a panel of a linear of `rows` rows: its panels are equal, but for the last."""
    return -(-rows // -(-rows // PANEL_ROWS))


def part_rows(rows: int) -> int:
    """How many of a linear's `rows` are solved side by side."""
    return max(PART_ROWS, -(-rows // PARTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSchedule:
    """One decoder block."""

    name: str
    storage_device: Device | None
    """Where its weights rest: the cpu, where the map has cpu beside accelerators. None: in the files, from
    which they are read when its turn comes."""
    execution_device: Device
    """Where it is worked on."""
    replayed: ReplayReason | None
    """None: forwards are parked between stages, so that each linear runs once per token. Else they are run
    again for each stage, and this is why."""
    expert_batch_bytes: int
    """Hessians of experts that are collected side by side, in bytes; also what is solved side by side."""
    solve_batch_rows: int
    """Rows of experts that are solved side by side: ΣN of all."""
    activations_on_host: bool = False
    """Hidden states rest in main memory, pinned, and visit the execution device one micro-batch at a time.
    Only for blocks whose forwards are replayed."""

    @property
    def parked(self) -> bool:
        """True when forwards are parked between stages."""
        return self.replayed is None

    @property
    def activation_device(self) -> Device:
        """Where the hidden states of all samples rest while it is worked on."""
        return CPU if self.activations_on_host else self.execution_device

    def experts_per_batch(self, in_features: int) -> int:
        """How many linears of K = `in_features` are collected side by side: at least one."""
        return max(1, self.expert_batch_bytes // (4 * in_features**2))

    def experts_per_solve(self, in_features: int, rows: int) -> int:
        """How many stages of K = `in_features` and `rows` = ΣN are solved side by side: at least one.

        Each needs its H and a factor, and SOLVE_BYTES for every weight.
        """
        size_bytes = 8 * in_features**2 + SOLVE_BYTES * rows * in_features
        return max(1, min(self.expert_batch_bytes // size_bytes, self.solve_batch_rows // rows))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The whole run."""

    json_properties: ClassVar[tuple[str, ...]] = ("micro_batch_tokens",)

    micro_batch_samples: int
    """Samples of one forward."""
    seq_len: int
    """Tokens of a sample."""
    blocks: tuple[BlockSchedule, ...]
    """In model order."""
    head_device: Device | None = None
    """Where the output head is worked on; None where it stays dense."""
    reads_ahead: bool = True
    """While a block is worked on, the next one is read from the files as far as main memory."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward."""
        return self.micro_batch_samples * self.seq_len

    @cached_property
    def _by_name(self) -> dict[str, BlockSchedule]:
        return {block.name: block for block in self.blocks}

    def block(self, name: str) -> BlockSchedule:
        """The schedule of one block. Raises `KeyError` for a name that is not among them."""
        return self._by_name[name]


def lighter(schedule: Schedule) -> tuple[Schedule, str] | None:
    """The same run with less memory, and what changes, in words; None where nothing is left to change.

    Step by step: on the cpu, no block read ahead; a quarter of the samples in a micro-batch, down to one;
    forwards replayed; hidden states on the host. Only the micro-batches can change codes, in the order in
    which sums are rounded.
    """
    blocks = schedule.blocks
    if schedule.reads_ahead and any(b.storage_device is None and b.execution_device == CPU for b in blocks):
        return replace(schedule, reads_ahead=False), "each block read when its turn comes, none ahead"
    samples = schedule.micro_batch_samples
    if samples > 1:
        fewer = max(1, samples // 4)
        words = f"micro-batches of {fewer} instead of {samples} samples"
        return replace(schedule, micro_batch_samples=fewer), words
    if any(block.parked for block in blocks):
        blocks = tuple(replace(b, replayed="memory") if b.parked else b for b in blocks)
        return replace(schedule, blocks=blocks), "forwards that run again for each stage"
    if any(b.execution_device != CPU and not b.activations_on_host for b in blocks):
        blocks = tuple(replace(block, activations_on_host=True) for block in blocks)
        return replace(schedule, blocks=blocks), "hidden states in the memory of the host"
    return None
