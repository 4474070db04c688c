"""Events folded into what a display shows: one frozen `State`, and `advance(state, event, now)`.

A live display redraws in a thread of its own while the engine reports from another. Every event makes a new
state, and the display keeps one reference to the newest, so a redraw never sees half a change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    CacheFlushed,
    DeviceMemory,
    Event,
    FindingRaised,
    LinearQuantized,
    Phase,
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
)
from gptq_cli.results.run import LinearReport

REMEMBERED = 8
"""Linears kept for the table of the last ones, and blocks used to estimate the remaining time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseState:
    """The phase in progress; `total` is None where it is unknown."""

    phase: Phase
    done: int
    total: int | None
    since: float
    until: float | None = None
    """When it is expected to end; None where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockState:
    """The block in progress: its samples, its linears, and when it started."""

    name: str
    index: int
    total: int
    device: str
    since: float
    linears: int
    linears_done: int = 0
    stage: int = 0
    stages: int = 0
    samples_done: int = 0
    samples_total: int = 0
    finished: bool = False
    """A finished block is kept until the next one starts, so that the picture does not jump."""


@dataclass(frozen=True, slots=True)
class Recent:
    """A finished linear and the block that it belongs to."""

    block: str
    report: LinearReport


@dataclass(frozen=True, slots=True)
class Waiting:
    """This process waits for others."""

    ranks: tuple[str, ...]
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a display needs to draw one picture."""

    since: float
    phase: PhaseState | None = None
    block: BlockState | None = None
    blocks_done: int = 0
    blocks_total: int = 0
    block_seconds: tuple[float, ...] = ()
    """Wall seconds of the last blocks, measured between events (packing and writing included)."""
    recent: tuple[Recent, ...] = ()
    linears_done: int = 0
    fallbacks: int = 0
    memory: tuple[DeviceMemory, ...] = ()
    ranks: RanksReported | None = None
    """Several processes: how all of them were when it was told last."""
    waiting: Waiting | None = None
    flush: CacheFlushed | None = None
    finished: bool = False
    until: float | None = None
    """When the run should end by the estimate that was made at its start; None where there is none."""

    def remaining_seconds(self, now: float) -> float | None:
        """Time left for the blocks, from the mean of the last ones; before the first is finished, by the
        estimate that was made at the start. None where neither is known."""
        if not self.block_seconds or not self.blocks_total:
            return None if self.until is None else max(0.0, self.until - now)
        mean = sum(self.block_seconds) / len(self.block_seconds)
        on_device = self.block is not None and not self.block.finished
        spent = min(now - self.block.since, mean) if self.block and on_device else 0.0
        return max(0.0, mean * (self.blocks_total - self.blocks_done) - spent)


def _merged(known: tuple[DeviceMemory, ...], news: tuple[DeviceMemory, ...]) -> tuple[DeviceMemory, ...]:
    devices = {entry.device: entry for entry in (*known, *news)}
    return tuple(devices.values())


def _counted(block: BlockState | None, name: str) -> BlockState | None:
    """The block in progress with one linear more, if that is its own: the head belongs to none."""
    if block is None or block.name != name:
        return block
    return replace(block, linears_done=block.linears_done + 1)


def advance(state: State, event: Event, now: float) -> State:
    """The state after `event`, which happened at `now` seconds."""
    match event:
        case RunStarted():
            until = None if event.seconds is None else now + event.seconds
            return replace(state, blocks_total=event.blocks, until=until)
        case PhaseStarted():
            return replace(state, phase=PhaseState(phase=event.phase, done=0, total=event.total, since=now))
        case PhaseAdvanced():
            since = state.phase.since if state.phase and state.phase.phase == event.phase else now
            until = None if event.remaining_seconds is None else now + event.remaining_seconds
            phase = PhaseState(
                phase=event.phase, done=event.done, total=event.total, since=since, until=until
            )
            return replace(state, phase=phase)
        case TextGenerated(_, tokens):
            return replace(state, phase=state.phase and replace(state.phase, done=tokens))
        case PhaseFinished():
            return replace(state, phase=None)
        case BlockStarted():
            block = BlockState(
                name=event.name,
                index=event.index,
                total=event.total,
                device=event.device,
                since=now,
                linears=sum(len(stage) for stage in event.stages),
                stages=len(event.stages),
            )
            return replace(state, phase=None, block=block, blocks_total=event.total, blocks_done=event.index)
        case SamplesAdvanced():
            if state.block is None:
                return state
            block = replace(
                state.block,
                stage=event.stage,
                stages=event.stages,
                samples_done=event.done,
                samples_total=event.total,
            )
            return replace(state, block=block)
        case LinearQuantized():
            return replace(
                state,
                block=_counted(state.block, event.block),
                recent=(*state.recent, Recent(event.block, event.report))[-REMEMBERED:],
                linears_done=state.linears_done + 1,
                fallbacks=state.fallbacks + (event.report.method != "gptq"),
            )
        case CacheFlushed():
            return replace(state, flush=event, memory=_merged(state.memory, event.after))
        case BlockFinished():
            seconds = now - state.block.since if state.block else event.report.seconds
            return replace(
                state,
                block=state.block and replace(state.block, finished=True),
                blocks_done=event.index + 1,
                blocks_total=event.total,
                block_seconds=(*state.block_seconds, seconds)[-REMEMBERED:],
                memory=_merged(state.memory, event.memory),
            )
        case RanksReported():
            return replace(state, ranks=event)
        case RanksWaited():
            waiting = None if event.over else Waiting(event.ranks, now - event.seconds)
            return replace(state, waiting=waiting)
        case RunFinished():
            return replace(state, phase=None, block=None, waiting=None, finished=True)
        case FindingRaised() | Warned() | ShardWritten():
            return state
        case _:
            assert_never(event)
