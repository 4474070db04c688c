"""The moving part of the live display, drawn from a `State`: bars, the last linears, memory, the last flush.

Nothing wraps: names are cut in the middle, columns that do not fit the width are left out. Every fact that is
shown by a colour is also shown in words.

     blocks   ━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━  12/30   0:03:21, 0:05:02 left
     samples  ━━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━  96/128  stage 2 of 4
     linears  ━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━  3/7     model.layers.12 on cuda:0
     cuda:0   ████████▓▓▓▓░░░░  allocated 1.25  reserved 1.90  peak 1.75 of 24.0 GiB
     flush    after model.layers.11: gave back 307 MiB (cuda:0 2.20 -> 1.90 GiB)
"""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptq_cli.display import format as fmt
from gptq_cli.display.plain import flush_text, flush_title
from gptq_cli.display.state import BlockState, PhaseState, Recent, State
from gptq_cli.events import DeviceMemory

LABEL_WIDTH = 9
"""A label with the space before it."""
WIDE = 110
"""The width from which on the table of linears has room for shapes, damping and seconds."""
FIXED_LINES = 9
"""Lines of the picture beside the table of linears and the devices."""
NAME_WIDTH = 56
"""The largest width for the name of a linear: numbers far from the name are hard to read."""
BAR_WIDTH = 16
NEARLY_FULL = 0.95


class Picture:
    """A renderable: `state` at `now` seconds."""

    def __init__(self, state: State, now: float) -> None:
        self._state = state
        self._now = now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state, width = self._state, options.max_width
        bars = _bars(state, self._now, width)
        if bars:
            yield ""
            yield bars
        room = console.height - FIXED_LINES - len(state.memory)
        shown = state.recent[-max(1, min(6, room)) :]
        if shown:
            yield ""
            yield _linears(shown, width)
        if state.memory or state.flush:
            yield ""
        for memory in state.memory:
            yield memory_line(memory, width)
        if state.flush:
            title = flush_title(state.flush).removeprefix("flush ")
            yield _line("flush", f"{title}: {flush_text(state.flush)}", width)
        if state.fallbacks:
            of = fmt.count(state.linears_done, "linear")
            text = f"{state.fallbacks} of {of} fell back to round-to-nearest"
            yield _line("FALLBACK", text, width, style="bold red")


def _line(label: str, text: str, width: int, style: str = "") -> Text:
    room = max(width - LABEL_WIDTH - 2, 1)
    body = Text(f" {label:<{LABEL_WIDTH - 1}} ", style=style or "bold", no_wrap=True, overflow="ellipsis")
    return body.append(fmt.shorten(text, room), style=style or "default not bold")


def _bars(state: State, now: float, width: int) -> Table | None:
    block, phase = state.block, state.phase
    if state.finished:
        return None
    side = min(48, max(26, width // 3))
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=LABEL_WIDTH, no_wrap=True, style="bold")
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right", min_width=7)
    grid.add_column(width=side, no_wrap=True, overflow="ellipsis")
    if state.blocks_total and (block or state.blocks_done):
        elapsed = fmt.clock(now - state.since)
        times = f"{elapsed}, {fmt.clock(state.remaining_seconds(now))} left"
        done = state.blocks_done + (_fraction(block) if block else 0.0)
        bar = ProgressBar(total=state.blocks_total, completed=done)
        grid.add_row(" blocks", bar, f"{state.blocks_done}/{state.blocks_total}", times)
    if block:
        for row in _block_rows(block, side):
            grid.add_row(*row)
    if phase:
        grid.add_row(*_phase_row(_PHASES.get(phase.phase, phase.phase), phase, now))
    elif not (block or state.blocks_done):
        waiting = PhaseState(phase="startup", done=0, total=None, since=state.since)
        grid.add_row(*_phase_row("starting", waiting, now))
    return grid


def _fraction(block: BlockState) -> float:
    if block.finished or not block.linears:
        return 0.0  # a finished block is in `blocks_done` already
    return min(1.0, block.linears_done / block.linears)


def _block_rows(block: BlockState, side: int) -> list[tuple[RenderableType, ...]]:
    samples = ProgressBar(total=block.samples_total or 1, completed=block.samples_done)
    counted = f"{block.samples_done}/{block.samples_total}" if block.samples_total else ""
    stage = f"stage {block.stage + 1} of {block.stages}" if block.stages else ""
    linears = ProgressBar(total=block.linears or 1, completed=block.linears_done)
    where = f" on {block.device}"
    name = fmt.shorten_name(block.name, max(side - len(where), 8)) + where
    return [
        (" samples", samples, counted, stage),
        (" linears", linears, f"{block.linears_done}/{block.linears}", name),
    ]


def _phase_row(label: str, phase: PhaseState, now: float) -> tuple[RenderableType, ...]:
    spent = now - phase.since
    if phase.total is None:
        bar = ProgressBar(total=None, pulse=True, animation_time=spent)
        counted = str(phase.done) if phase.done else ""
    else:
        bar = ProgressBar(total=phase.total, completed=phase.done)
        counted = f"{phase.done}/{phase.total}"
    left = f", {fmt.clock(max(0.0, phase.until - now))} left" if phase.until is not None else ""
    return (f" {label}", bar, counted, f"{fmt.clock(spent)}{left}")


_PHASES = {
    "startup": "starting",
    "calibration": "text",
    "verify": "tensors",
    "generate": "tokens",
    "bench": "rounds",
    "evaluate": "windows",
    "tasks": "requests",
}
"""What a phase's bar counts, used as the label where the phase's own name would not fit."""


def _linears(recent: tuple[Recent, ...], width: int) -> Table:
    wide = width >= WIDE
    table = Table.grid(padding=(0, 2))
    headings = ["loss", "nearest", "change", "method"]
    if wide:
        headings = ["shape", *headings[:3], "damping", "seconds", headings[3]]
    taken = 18 + 2 + 3 * 9 + (34 if wide else 0)
    room = min(max(width - taken, 9), NAME_WIDTH)
    table.add_column(width=room, no_wrap=True, overflow="ellipsis")
    for heading in headings:
        left = heading == "method"
        table.add_column(justify="left" if left else "right", no_wrap=True, min_width=18 if left else 7)
    table.add_row(" last linears", *headings, style="bold")
    for item in reversed(recent):
        report = item.report
        fallback = report.method != "gptq"
        name = fmt.shorten_name(fmt.short_linear(report.name, item.block), room - 1)
        cells = [
            fmt.loss(report.loss),
            fmt.loss(report.rtn_loss),
            fmt.change(report.loss, report.rtn_loss),
            method_text(report.method, report.attempts),
        ]
        if wide:
            shape = f"{report.out_features} x {report.in_features}"
            cells = [shape, *cells[:3], f"{report.damp_percent:g}", f"{report.seconds:.2f}", cells[3]]
        table.add_row(f" {name}", *cells, style="bold red" if fallback else "")
    return table


def method_text(method: str, attempts: int) -> str:
    """`gptq`, `gptq, 2 tries`, `FALLBACK rtn`: a fallback is shown by a word, too."""
    if method != "gptq":
        return f"FALLBACK {method}"
    return method if attempts == 1 else f"{method}, {attempts} tries"


def memory_line(memory: DeviceMemory, width: int) -> Text:
    """One device: a bar of allocated, reserved and total, and the figures."""
    total = max(memory.total_bytes, 1)
    figures = f"peak {fmt.gib(memory.peak_bytes)} of {fmt.gib(memory.total_bytes)} GiB"
    if memory.device == "cpu":
        figures = f"resident {fmt.gib(memory.allocated_bytes)}  {figures}"
    else:
        held = f"allocated {fmt.gib(memory.allocated_bytes)}  reserved {fmt.gib(memory.reserved_bytes)}"
        figures = f"{held}  {figures}"
    high = memory.peak_bytes > NEARLY_FULL * total
    if high:
        figures += "  NEARLY FULL"
    cells = max(1, min(BAR_WIDTH * (width // 80), width - LABEL_WIDTH - len(figures) - 4))
    line = Text(f" {memory.device:<{LABEL_WIDTH - 1}} ", style="bold", no_wrap=True, overflow="ellipsis")
    allocated = min(cells, round(cells * memory.allocated_bytes / total))
    reserved = min(cells, max(allocated, round(cells * memory.reserved_bytes / total)))
    line.append("█" * allocated, style="cyan not bold")
    line.append("▓" * (reserved - allocated), style="blue not bold")
    line.append("░" * (cells - reserved), style="dim not bold")
    return line.append(f"  {figures}", style="bold red" if high else "not bold")
