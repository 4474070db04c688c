"""What the engine says while it works: frozen data, handed to an observer function.

`Observer = Callable[[Event], None]`. The engine never draws; tests pass `events.append`; displays
`match event` and end with `assert_never`, so that a new event cannot be forgotten anywhere.
All sizes are bytes, all times seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from gptq_cli.findings import Finding
from gptq_cli.results.run import BlockReport, LinearReport, RunReport

FlushPoint = Literal["capture", "block", "end"]
Phase = Literal[
    "startup",
    "download",
    "open",
    "calibration",
    "write",
    "bits",
    "load",
    "gradients",
    "capture",
    "head",
    "tune",
    "resume",
    "save",
    "verify",
    "generate",
    "bench",
    "dense",
    "evaluate",
    "tasks",
    "upload",
]


COUNTED_IN_BYTES: frozenset[Phase] = frozenset({"download"})
"""Phases whose steps are bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Memory of one device now. On "cpu": allocated = reserved = resident set size of the process."""

    device: str
    allocated_bytes: int
    reserved_bytes: int
    peak_bytes: int
    """Highest `allocated_bytes` since the last reset (accelerators: each block; cpu: each job)."""
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The plan, before the first weight is read."""

    command: str
    model: str
    out: str | None
    settings: tuple[tuple[str, str], ...]
    """Label and value pairs to show in a header, in order: bits, group size, dtype, calibration, …"""
    devices: tuple[str, ...]
    blocks: int
    linears: int
    seconds: float | None = None
    """How long it will take, by a short probe of the machine; None: too short a time for one."""


@dataclass(frozen=True, slots=True)
class FindingRaised:
    """A preflight finding; one that is an error is raised as an exception too."""

    finding: Finding


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """Work outside the block loop begins; `total` steps, None when unknown."""

    phase: Phase
    total: int | None = None


@dataclass(frozen=True, slots=True)
class PhaseAdvanced:
    """`done` steps of the phase are finished: bytes of a download, else tensors, samples, blocks, …"""

    phase: Phase
    done: int
    total: int | None = None
    remaining_seconds: float | None = None
    """Time left, from that of the steps so far; None where it is not known, or nothing is left."""


@dataclass(frozen=True, slots=True)
class PhaseFinished:
    """The phase took `seconds`; `detail` says the outcome in one short clause for a log line."""

    phase: Phase
    seconds: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TextGenerated:
    """The next piece of the text; `tokens` are out so far. The pieces put together are the text."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStarted:
    """Decoder block `name`, number `index` (from 0) of `total`."""

    name: str
    index: int
    total: int
    device: str
    stages: tuple[tuple[str, ...], ...]
    """Names of the linears, relative to the block, stage by stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesAdvanced:
    """`done` of `total` calibration samples went through stage `stage` (from 0) of `stages` of the block."""

    block: str
    stage: int
    stages: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class LinearQuantized:
    """One linear is finished; `report.method` says whether it fell back to round-to-nearest."""

    block: str
    report: LinearReport


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFlushed:
    """The device caches were emptied; `before` and `after` hold one entry per device, in the same order."""

    where: FlushPoint
    subject: str
    """The block's name at "block", else ""."""
    before: tuple[DeviceMemory, ...]
    after: tuple[DeviceMemory, ...]

    @property
    def freed_bytes(self) -> int:
        """Reserved bytes given back, summed over the devices; never negative."""
        pairs = zip(self.before, self.after, strict=True)
        return max(0, sum(b.reserved_bytes - a.reserved_bytes for b, a in pairs))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFinished:
    """The block is quantized, packed and kept: a run that ends here goes on after it."""

    index: int
    total: int
    report: BlockReport
    memory: tuple[DeviceMemory, ...]
    remaining_seconds: float = 0.0
    """For the blocks to come, from the mean of those done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """One of several processes, as it is now."""

    rank: int
    host: str
    memory: tuple[DeviceMemory, ...]
    """Of its accelerator, where it has one, and of its machine's main memory."""
    waited_seconds: float
    """For the others, since this was told last."""

    @property
    def name(self) -> str:
        """`rank 1 on node2`."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksReported:
    """Several processes: how all of them are, after capture and after each block."""

    block: str
    """That they have finished; "" before the first."""
    ranks: tuple[RankState, ...]

    @property
    def slowest(self) -> RankState:
        """The one that the others waited for: it waited least."""
        return min(self.ranks, key=lambda one: one.waited_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksWaited:
    """This process has waited for others for more than a moment, and goes on waiting unless it is `over`."""

    seconds: float
    ranks: tuple[str, ...]
    """Those that have not come, as `rank 1 on node2`; () where all are there and data is on its way."""
    over: bool = False
    """They have come."""


@dataclass(frozen=True, slots=True)
class ShardWritten:
    """A file of the checkpoint is on disk."""

    path: str
    size_bytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class Warned:
    """Something a person should know; the work goes on."""

    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The checkpoint is in place."""

    report: RunReport


Event = (
    RunStarted
    | FindingRaised
    | PhaseStarted
    | PhaseAdvanced
    | PhaseFinished
    | TextGenerated
    | BlockStarted
    | SamplesAdvanced
    | LinearQuantized
    | CacheFlushed
    | BlockFinished
    | RanksReported
    | RanksWaited
    | ShardWritten
    | Warned
    | RunFinished
)
Observer = Callable[[Event], None]


def warning_text(event: Event) -> str | None:
    """The text of an event that is a warning, as reports keep it; None for every other event.

    A warning is a `Warned` event, or a finding of that level; this is the one place that decides.
    """
    match event:
        case Warned(message):
            return message
        case FindingRaised(Finding(level="warning") as finding):
            about = f"{finding.subject}: " if finding.subject else ""
            return f"[{finding.rule}] {about}{finding.message}"
        case _:
            return None


def ignore(event: Event) -> None:
    """Observe nothing."""


@contextmanager
def phase(observer: Observer, name: Phase, total: int | None = None) -> Iterator[list[str]]:
    """Announce the start of a phase and, unless something was raised, its end.

    Words added to the list that it yields become the `detail` of the end.
    """
    observer(PhaseStarted(name, total))
    started = time.perf_counter()
    words: list[str] = []
    yield words
    observer(PhaseFinished(name, time.perf_counter() - started, ", ".join(words)))


def counted(observer: Observer, name: Phase, *, uncounted: int = 0) -> Callable[[int, int], None]:
    """A callback for (steps done, steps in all) that announces each with the time left.

    `uncounted`: steps that are run but not counted, such as a warm-up: they take time as well.
    """
    started = time.perf_counter()

    def advanced(done: int, total: int) -> None:
        ran = done + uncounted
        left = (time.perf_counter() - started) / ran * (total - done) if ran and done < total else None
        observer(PhaseAdvanced(name, done, total, left))

    return advanced
