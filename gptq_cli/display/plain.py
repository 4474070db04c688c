"""One line per event, for a CI log: elapsed time first, no colour, no cursor movement, nothing overwritten.

Samples get no line of their own. A stage gets one after its last sample, and if it takes long, a heartbeat
line in between, because CI systems end jobs that print nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO, assert_never

from gptq_cli.display import format as fmt
from gptq_cli.events import (
    COUNTED_IN_BYTES,
    BlockFinished,
    BlockStarted,
    CacheFlushed,
    DeviceMemory,
    Event,
    FindingRaised,
    LinearQuantized,
    PhaseAdvanced,
    PhaseFinished,
    PhaseStarted,
    RanksReported,
    RanksWaited,
    RunFinished,
    RunStarted,
    SamplesAdvanced,
    ShardWritten,
    TextGenerated,
    Warned,
    warning_text,
)
from gptq_cli.wording import names_text, number_of

HEARTBEAT_SECONDS = 30.0
LONG_WAIT_SECONDS = 10.0
"""Waiting for other ranks is told from here on."""
MAX_RANKS_TOLD = 8


class PlainDisplay:
    """An observer that writes lines to `stream`; a context manager like every display."""

    def __init__(
        self,
        stream: TextIO,
        get_time: Callable[[], float] = time.monotonic,
        *,
        stamp: Callable[[], str] | None = None,
    ) -> None:
        """`stamp`: what begins a line; None: the elapsed time."""
        self._stream = stream
        self._get_time = get_time
        self._stamp = stamp
        self._since = get_time()
        self._last_line = self._since

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def __call__(self, event: Event) -> None:
        now = self._get_time()
        quiet_for = now - self._last_line
        for text in lines(event, heartbeat=quiet_for >= HEARTBEAT_SECONDS):
            self._last_line = now
            self._write(text)
        self._stream.flush()

    def record(self, text: str) -> None:
        """A line that is no event: what a library wrote, or the error that ends the work."""
        self._write(text)
        self._stream.flush()

    def _write(self, text: str) -> None:
        stamp = self._stamp() if self._stamp is not None else fmt.clock(self._get_time() - self._since)
        self._stream.write(f"[{stamp}] {text}\n")


class WarningsDisplay:
    """An observer that writes only warnings: `--progress none`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> WarningsDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def __call__(self, event: Event) -> None:
        if warning_text(event) is not None:
            self._stream.writelines(f"{text}\n" for text in lines(event))
            self._stream.flush()


def lines(event: Event, *, heartbeat: bool = False) -> tuple[str, ...]:
    """The lines for `event`; `heartbeat`: also a line for an event that is only a small step."""
    match event:
        case RunStarted():
            return _started(event)
        case FindingRaised(finding):
            return finding.lines
        case PhaseStarted(phase):
            return (f"{phase}: started",)
        case PhaseAdvanced(phase, done, total):
            count = fmt.size if phase in COUNTED_IN_BYTES else str
            of = f"{count(done)}/{count(total)}" if total is not None else count(done)
            remaining = event.remaining_seconds
            early = remaining is not None and done <= 1 and remaining >= HEARTBEAT_SECONDS
            times = f", {fmt.clock(remaining)} left" if remaining is not None else ""
            return (f"{phase}: {of}{times}",) if heartbeat or early else ()
        case PhaseFinished(phase, seconds, detail):
            return (f"{phase}: done in {fmt.duration(seconds)}{', ' if detail else ''}{detail}",)
        case TextGenerated(_, tokens):
            return (f"generate: {number_of(tokens, 'token')}",) if heartbeat else ()
        case BlockStarted():
            linears = number_of(sum(len(stage) for stage in event.stages), "linear")
            stages = number_of(len(event.stages), "stage")
            where = f"{event.name} on {event.device}"
            return (f"block {event.index + 1}/{event.total} {where}: {linears} in {stages}",)
        case SamplesAdvanced():
            if event.done < event.total and not heartbeat:
                return ()
            stage = f"{event.block} stage {event.stage + 1}/{event.stages}"
            return (f"{stage}: sample {event.done}/{event.total}",)
        case LinearQuantized(_, report):
            losses = f"loss {fmt.loss(report.loss)}, round-to-nearest {fmt.loss(report.rtn_loss)}"
            how = report.method if report.attempts == 1 else f"{report.method}, {report.attempts} attempts"
            if report.method != "gptq":
                how = f"FALLBACK to {how}"
            damping = f"damping {report.damp_percent:g}"
            return (f"{report.name}: {losses}, {how}, {damping}, {fmt.duration(report.seconds)}",)
        case CacheFlushed():
            return _flushed(event)
        case BlockFinished():
            took = f"block {event.index + 1}/{event.total} {event.report.name}: done in"
            memory = "; ".join(memory_text(entry) for entry in event.memory)
            left = f"; {fmt.clock(event.remaining_seconds)} left" if event.remaining_seconds else ""
            return (f"{took} {fmt.duration(event.report.seconds)}{left}; {memory}",)
        case RanksReported():
            return (f"{ranks_title(event)}: {'; '.join(rank_texts(event))}",)
        case RanksWaited():
            return (waiting_text(event),) if event.seconds >= LONG_WAIT_SECONDS else ()
        case ShardWritten(path, size_bytes, tensors):
            return (f"written: {path}, {fmt.size(size_bytes)}, {number_of(tensors, 'tensor')}",)
        case Warned(message, hint):
            return (f"warning: {message}", *((f"  hint: {hint}",) if hint else ()))
        case RunFinished(report):
            return (f"finished: {report.out} in {fmt.duration(report.seconds)}",)
        case _:
            assert_never(event)


def memory_text(memory: DeviceMemory) -> str:
    """`cuda:0 allocated 1.25 reserved 1.90 peak 1.75 of 24.0 GiB`; `cpu resident …`."""
    used = f"allocated {fmt.gib(memory.allocated_bytes)} reserved {fmt.gib(memory.reserved_bytes)}"
    if memory.device == "cpu":
        used = f"resident {fmt.gib(memory.allocated_bytes)}"
    return f"{memory.device} {used} peak {fmt.gib(memory.peak_bytes)} of {fmt.gib(memory.total_bytes)} GiB"


def ranks_title(event: RanksReported) -> str:
    """`ranks after model.layers.3`, `ranks after capture`."""
    return f"ranks after {event.block or 'capture'}"


def rank_texts(event: RanksReported) -> list[str]:
    """Who was the slowest, and how every rank is; of many, those that are worth a look."""
    slowest = event.slowest
    waited = fmt.duration(max(one.waited_seconds for one in event.ranks) - slowest.waited_seconds)
    first = f"{slowest.name} the slowest, the others waited up to {waited}"
    if len(event.ranks) > MAX_RANKS_TOLD:
        fullest = max(event.ranks, key=lambda one: _fullness(one.memory[0]))
        return [first, f"fullest {fullest.name}, {memory_text(fullest.memory[0])}"]
    return [first, *(f"{one.name}: {memory_text(one.memory[0])}" for one in event.ranks)]


def _fullness(memory: DeviceMemory) -> float:
    return memory.peak_bytes / max(1, memory.total_bytes)


def waiting_text(event: RanksWaited) -> str:
    """`ranks: waiting for rank 1 on node2, 35 s`."""
    whom = names_text(event.ranks, 3) or "data on its way"
    return f"ranks: {'waited' if event.over else 'waiting'} for {whom}, {fmt.duration(event.seconds)}"


def flush_title(event: CacheFlushed) -> str:
    """`flush after model.layers.3`, `flush after capture`, `flush at the end`."""
    match event.where:
        case "capture":
            return "flush after capture"
        case "block":
            return f"flush after {event.subject}"
        case "end":
            return "flush at the end"
        case _:
            assert_never(event.where)


def flush_text(event: CacheFlushed) -> str:
    """How much memory a flush freed, and on which devices."""
    given = freed_text(event)
    moved = [
        f"{before.device} {fmt.gib(before.reserved_bytes)} -> {fmt.gib(after.reserved_bytes)} GiB"
        for before, after in zip(event.before, event.after, strict=True)
        if before.reserved_bytes != after.reserved_bytes
    ]
    return f"{given} ({', '.join(moved)})" if moved else given


def freed_text(event: CacheFlushed) -> str:
    """How much memory a flush freed."""
    return f"gave back {fmt.size(event.freed_bytes)}"


def _flushed(event: CacheFlushed) -> tuple[str, ...]:
    return (f"{flush_title(event)}: {flush_text(event)}",)


def _started(event: RunStarted) -> tuple[str, ...]:
    target = f" -> {event.out}" if event.out else ""
    settings = ", ".join(f"{label} {value}" for label, value in event.settings)
    work = f"{number_of(event.blocks, 'block')}, {number_of(event.linears, 'linear')}"
    first = f"{event.command} {event.model}{target}"
    return (first, f"plan: {settings}; {work} on {', '.join(event.devices)}")
