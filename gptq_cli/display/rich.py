"""The live display for a terminal: finished things scroll up, the moving part stays at the bottom.

Finished: the header with the plan, findings, finished phases, one line per block with the memory that its
flush freed, fallbacks. Moving: `picture.py`. The console and the clock are arguments, so that tests can set
both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import assert_never

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gptq_cli.display import format as fmt
from gptq_cli.display.escapes import one_line
from gptq_cli.display.live import Live
from gptq_cli.display.picture import WIDE, Picture
from gptq_cli.display.plain import flush_text, flush_title, freed_text
from gptq_cli.display.state import State, advance
from gptq_cli.display.tables import LEVEL_STYLES, findings_table
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    CacheFlushed,
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
)
from gptq_cli.findings import Finding
from gptq_cli.wording import number_of

REFRESHES_PER_SECOND = 8.0
LABEL_WIDTH = 11
"""The label of a settled line with the spaces around it."""
NAME_WANTED, NAME_FROM = 14, 7
"""The room for the name after it for which facts are left out, all but two and all but one."""
LEADER_FROM = 40
"""From this many spaces on, dots fill the gap between a name and its facts."""


class RichDisplay:
    """An observer that draws on `console`; a context manager, which leaves the cursor as it found it."""

    def __init__(
        self,
        console: Console,
        get_time: Callable[[], float] = time.monotonic,
        *,
        beside_text: bool = False,
        breaks_lines: bool = True,
    ) -> None:
        """`beside_text`: generated text appears on the same terminal; the moving part is hidden meanwhile.

        `breaks_lines`: see `live.breaks_lines`.
        """
        self._console = console
        self._get_time = get_time
        self._state = State(since=get_time())
        self._findings: tuple[Finding, ...] = ()
        self._finished: BlockFinished | None = None
        self._execution_device = ""
        self._beside_text = beside_text
        self._makes_way = False
        self._live = Live(console, self._picture, per_second=REFRESHES_PER_SECOND, broken=breaks_lines)

    def __enter__(self) -> RichDisplay:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._print_findings()
        self._print_block(None)
        self._live.stop()
        block = self._state.block
        if kind is not None and block is not None and not block.finished:
            where = f"block {block.index + 1}/{block.total}, {block.name}"
            self._print(
                Text(f"stopped in {where}, {block.linears_done} of {number_of(block.linears, 'linear')} done")
            )

    def __call__(self, event: Event) -> None:
        self._make_way(isinstance(event, TextGenerated))
        if not isinstance(event, FindingRaised):
            self._print_findings()
        self._print_block(event if isinstance(event, CacheFlushed) and event.where == "block" else None)
        self._settle(event)
        self._state = advance(self._state, event, self._get_time())

    def log(self, text: str) -> None:
        """Print a line that a library wrote to standard error, above the moving part."""
        self._print(Text(one_line(text)))

    def _make_way(self, for_text: bool) -> None:
        """Hide the moving part while text is written, and show it below the text afterwards."""
        if not self._beside_text or for_text == self._makes_way:
            return
        self._makes_way = for_text
        if for_text:
            self._live.stop()
        else:
            self._live.start()

    def _picture(self) -> RenderableType:
        return Picture(self._state, self._get_time())

    def _print(self, *lines: RenderableType) -> None:
        self._live.print(*lines)

    def _print_findings(self) -> None:
        """Print the findings collected so far as one table, when an event of another kind arrives."""
        if self._findings:
            findings, self._findings = self._findings, ()
            self._print(findings_table(findings))

    def _settle(self, event: Event) -> None:
        """Print what will no longer change."""
        width = self._console.width
        match event:
            case RunStarted():
                self._print(header(event, width))
            case FindingRaised(finding):
                self._findings += (finding,)
            case PhaseFinished(phase, seconds, detail):
                self._print(settled("done", phase, (detail, fmt.duration(seconds)), width))
            case CacheFlushed(where="capture" | "end"):
                room = width - LABEL_WIDTH - NAME_FROM - 2
                freed = fmt.fitting((flush_text(event), freed_text(event), fmt.size(event.freed_bytes)), room)
                self._print(settled("flush", _after(event), (freed,), width, "dim"))
            case BlockFinished():
                self._finished = event
                self._execution_device = self._state.block.device if self._state.block else ""
            case ShardWritten(path, size_bytes, tensors):
                facts = (number_of(tensors, "tensor"), fmt.size(size_bytes))
                self._print(settled("written", path, facts, width))
            case Warned(message, hint):
                self._print(warned(message, hint))
            case (
                PhaseStarted()
                | PhaseAdvanced()
                | TextGenerated()
                | BlockStarted()
                | SamplesAdvanced()
                | LinearQuantized()
                | CacheFlushed()
                | RanksReported()
                | RanksWaited()
                | RunFinished()
            ):
                return
            case _:
                assert_never(event)

    def _print_block(self, flush: CacheFlushed | None) -> None:
        """Print the line of a finished block, which waits for the next event, the block's flush."""
        if self._finished is not None:
            finished, self._finished = self._finished, None
            fallbacks = sum(report.method != "gptq" for report in finished.report.linears)
            label, style = ("FALLBACK", "bold red") if fallbacks else ("done", "")
            facts = block_facts(finished, flush, self._execution_device, wide=self._console.width >= WIDE)
            self._print(settled(label, finished.report.name, facts, self._console.width, style))


def block_facts(
    event: BlockFinished, flush: CacheFlushed | None, execution_device: str, *, wide: bool
) -> tuple[str, ...]:
    """`loss 0.0203`, `peak 1.75 GiB`, `freed 307 MiB`, `6.6 s`, without facts that are unknown.

    `wide` adds the change against round-to-nearest, the count of fallbacks and the device
    (`execution_device`).
    """
    linears = event.report.linears
    facts = []
    if linears:
        fallbacks = sum(report.method != "gptq" for report in linears)
        if fallbacks and wide:
            facts.append(f"{number_of(fallbacks, 'linear')} fell back")
        mean = sum(report.loss for report in linears) / len(linears)
        nearest = sum(report.rtn_loss for report in linears) / len(linears)
        change = fmt.change(mean, nearest)
        facts.append(f"loss {fmt.loss(mean):>7}{f' ({change})' if change and wide else ''}")
    peaks = event.report.peak_bytes
    if peaks:
        device, peak = next((entry for entry in peaks if entry[0] == execution_device), peaks[0])
        facts.append(f"{f'{device} ' if wide else ''}peak {fmt.size(peak):>8}")
    if flush is not None:
        facts.append(f"freed {fmt.size(flush.freed_bytes):>8}")
    return (*facts, f"{fmt.duration(event.report.seconds):>6}")


def _after(event: CacheFlushed) -> str:
    return flush_title(event).removeprefix("flush ")


def settled(label: str, name: str, facts: Sequence[str], width: int, style: str = "") -> Text:
    """One line that stays: a label, a name cut to fit, the facts at the right end.

    Where they do not fit, facts are left out from the last but one on: the last says how long it took.
    """
    shown = [fact for fact in facts if fact]
    for kept, least in ((2, min(len(name), NAME_WANTED)), (1, NAME_FROM)):
        while len(shown) > kept and LABEL_WIDTH + least + 2 + len("  ".join(shown)) > width:
            del shown[-2]
    text = "  ".join(shown)
    room = width - LABEL_WIDTH - len(text) - 2
    cut = fmt.shorten_name(name, max(room, NAME_FROM))
    line = Text(f" {label:<8}  ", style=style or "green", no_wrap=True, overflow="ellipsis")
    line.append(cut, style=style or "default")
    gap = room - len(cut)
    leader = "·" * (gap - 2) if gap > LEADER_FROM else ""
    line.append(f" {leader:<{max(gap - 1, 0)}} ", style="dim")
    return line.append(text, style=style or "default")


def warned(message: str, hint: str) -> Table:
    """A warning of the engine, wrapped under its label."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=9, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(" warning", style=LEVEL_STYLES["warning"]), Text(message))
    if hint:
        grid.add_row(Text(" hint", style="cyan"), Text(hint, style="cyan"))
    return grid


def header(event: RunStarted, width: int) -> Panel:
    """Model, destination, plan and devices in a frame."""
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(ratio=1, overflow="fold")
    room = max(width - 16, 8)
    grid.add_row("model", Text(fmt.shorten(event.model, room)))
    if event.out:
        grid.add_row("out", Text(fmt.shorten(event.out, room)))
    plan = " · ".join(f"{label} {value}" for label, value in event.settings)
    if plan:
        grid.add_row("plan", Text(plan))
    work = f"{number_of(event.blocks, 'block')}, {number_of(event.linears, 'linear')}"
    grid.add_row("where", Text(f"{', '.join(event.devices)} · {work}"))
    return Panel(grid, title=f"gptq {event.command}", title_align="left", border_style="dim")
