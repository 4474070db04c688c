"""The moving part of the live display, drawn from a `State`: bars, the last linears, memory, the last flush.

Nothing wraps: names are cut in the middle; columns, bars and words that do not fit the width are left out.
Every fact that is shown by a colour or a glyph is also shown in words.

     blocks   ━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━  12/30   0:03:21, 0:05:02 left
     samples  ━━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━  96/128  stage 2 of 4
     linears  ━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━  3/7     model.layers.12 on cuda:0
     cuda:0   ████▓▓░░░  █ allocated 1.25  ▓ reserved 1.90  peak 1.75 of 24.0 GiB
     flush    after model.layers.11: gave back 307 MiB (cuda:0 2.20 -> 1.90 GiB)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptq_cli.display import format as fmt
from gptq_cli.display.plain import flush_text, flush_title, freed_text
from gptq_cli.display.state import BlockState, PhaseState, Recent, State
from gptq_cli.events import COUNTED_IN_BYTES, DeviceMemory, Phase, RankState
from gptq_cli.wording import names_text, number_of

LABEL_WIDTH = 9
"""A label with the space before it."""
WIDE = 110
"""The width from which on the table of linears has room for shapes, damping and seconds."""
FIXED_LINES = 9
"""Lines of the picture beside the table of linears and the devices."""
NAME_WIDTH = 56
"""The largest width for the name of a linear: numbers far from the name are hard to read."""
NAME_WANTED, NAME_FROM = 18, 9
"""The width below which figures beside it are left out, and the least."""
BAR_WIDTH = 16
BAR_FROM = 4
"""The least width of a bar of memory that says something."""
BARS_FROM = 50
"""The width from which on there is room for bars of progress."""
METHOD_WIDTH = 18
NARROW = 60
"""Below this width the table of linears leaves out columns, and the method has less room."""
NEARLY_FULL = 0.95
MAX_RANKS_SHOWN = 7
"""Devices of other ranks that are shown, beside this one's."""
RANKS_FROM_LINES = 18
"""Lines of the terminal beside them."""


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
        others = _other_ranks(state, console.height)
        room = console.height - FIXED_LINES - len(state.memory) - len(others) - bool(state.ranks)
        shown = state.recent[-max(1, min(6, room)) :]
        if shown:
            yield ""
            yield _linears(shown, width)
        if state.memory or state.flush:
            yield ""
        for memory in state.memory:
            yield memory_line(memory, width)
        for one in others:
            yield memory_line(one.memory[0], width, rank=one)
        if state.ranks is not None or state.waiting is not None:
            style = "yellow" if state.waiting is not None else ""
            yield _line("ranks", _ranks_texts(state, self._now), width, style=style)
        if state.flush:
            title = flush_title(state.flush).removeprefix("flush ")
            freed = freed_text(state.flush)
            yield _line("flush", (f"{title}: {flush_text(state.flush)}", f"{title}: {freed}", freed), width)
        if state.fallbacks:
            of = number_of(state.linears_done, "linear")
            short = f"{state.fallbacks} of {of} fell back"
            yield _line("FALLBACK", (f"{short} to round-to-nearest", short), width, style="bold red")


def _line(label: str, texts: Sequence[str], width: int, style: str = "") -> Text:
    """A label and the first of `texts` that fits."""
    room = max(width - LABEL_WIDTH - 2, 1)
    body = Text(f" {label:<{LABEL_WIDTH - 1}} ", style=style or "bold", no_wrap=True, overflow="ellipsis")
    return body.append(fmt.fitting(texts, room), style=style or "default not bold")


def _other_ranks(state: State, height: int) -> list[RankState]:
    """Those whose device is shown beside this one's: of many the fullest, in order."""
    if state.ranks is None:
        return []
    others = [one for one in state.ranks.ranks if one.rank]
    room = max(1, min(MAX_RANKS_SHOWN, height - RANKS_FROM_LINES))
    fullest = sorted(others, key=lambda one: -one.memory[0].peak_bytes / max(1, one.memory[0].total_bytes))
    return sorted(fullest[:room], key=lambda one: one.rank)


def _ranks_texts(state: State, now: float) -> tuple[str, ...]:
    """For whom this one waits; else who was the slowest when they were compared last."""
    if state.waiting is not None:
        waited = fmt.clock(now - state.waiting.since)
        for_whom = names_text(state.waiting.ranks, 3) or "data on its way"
        return f"{waited} waiting for {for_whom}", f"{waited} {for_whom}"
    if state.ranks is None:
        return ("",)
    slowest = state.ranks.slowest
    longest = max(one.waited_seconds for one in state.ranks.ranks) - slowest.waited_seconds
    waited = f"{slowest.name} the slowest, the others waited {fmt.duration(longest)}"
    several = f"{len(state.ranks.ranks)} ranks"
    after = f"{waited} in {state.ranks.block}" if state.ranks.block else f"{waited} until capture ended"
    return f"{several}: {after}", after, waited, f"{slowest.name} the slowest", f"slowest {slowest.rank}"


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of progress."""

    label: str
    bar: ProgressBar
    counted: str
    beside: tuple[str, ...]
    """What stands at its end: the longest text first, of which the first is taken that fits."""


def _bars(state: State, now: float, width: int) -> Table | None:
    if state.finished:
        return None
    rows = list(_rows(state, now))
    labels = max([LABEL_WIDTH, *(len(row.label) + 1 for row in rows)])
    counted = max([7, *(len(row.counted) for row in rows)])
    with_bar = width >= BARS_FROM
    room = max(width - labels - counted - 2, 0)
    side = min(48, max(26, width // 3)) if with_bar else room
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=labels, no_wrap=True, style="bold")
    if with_bar:
        grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right", width=counted)
    grid.add_column(width=side, no_wrap=True, overflow="ellipsis")
    for row in rows:
        bar = (row.bar,) if with_bar else ()
        grid.add_row(f" {row.label}", *bar, row.counted, fmt.fitting(row.beside, side))
    return grid


def _rows(state: State, now: float) -> Iterator[_Row]:
    block, phase = state.block, state.phase
    if state.blocks_total and (block or state.blocks_done):
        left = f"{fmt.clock(state.remaining_seconds(now))} left"
        done = state.blocks_done + (_fraction(block) if block else 0.0)
        bar = ProgressBar(total=state.blocks_total, completed=done)
        times = (f"{fmt.clock(now - state.since)}, {left}", left)
        yield _Row("blocks", bar, f"{state.blocks_done}/{state.blocks_total}", times)
    if block:
        yield from _block_rows(block)
    if phase:
        yield _phase_row(phase, now)
    elif not (block or state.blocks_done):
        yield _phase_row(PhaseState(phase="startup", done=0, total=None, since=state.since), now)


def _fraction(block: BlockState) -> float:
    if block.finished or not block.linears:
        return 0.0  # a finished block is in `blocks_done` already
    return min(1.0, block.linears_done / block.linears)


def _block_rows(block: BlockState) -> Iterator[_Row]:
    samples = ProgressBar(total=block.samples_total or 1, completed=block.samples_done)
    counted = f"{block.samples_done}/{block.samples_total}" if block.samples_total else ""
    stage = f"stage {block.stage + 1} of {block.stages}" if block.stages else ""
    yield _Row("samples", samples, counted, (stage, f"{block.stage + 1}/{block.stages}" if stage else ""))
    linears = ProgressBar(total=block.linears or 1, completed=block.linears_done)
    names = [fmt.shorten_name(block.name, room) for room in (len(block.name), 16, NAME_FROM, 6)]
    where = (*(f"{name} on {block.device}" for name in names), *names)
    yield _Row("linears", linears, f"{block.linears_done}/{block.linears}", where)


def _phase_row(phase: PhaseState, now: float) -> _Row:
    spent = now - phase.since
    count = fmt.size if phase.phase in COUNTED_IN_BYTES else str
    if phase.total is None:
        bar = ProgressBar(total=None, pulse=True, animation_time=spent)
        counted = count(phase.done) if phase.done else ""
    else:
        bar = ProgressBar(total=phase.total, completed=phase.done)
        counted = f"{count(phase.done)}/{count(phase.total)}"
    left = f"{fmt.clock(max(0.0, phase.until - now))} left" if phase.until is not None else ""
    times = (f"{fmt.clock(spent)}, {left}", left) if left else (fmt.clock(spent),)
    counts = _COUNTS.get(phase.phase)
    if counts is not None:
        times = (f"{counts}, {times[0]}", *times)
    return _Row(phase.phase, bar, counted, times)


_COUNTS: dict[Phase, str] = {
    "load": "tensors",
    "capture": "samples",
    "head": "samples",
    "gradients": "blocks",
    "tune": "steps",
    "write": "tokens",
    "bits": "blocks",
    "verify": "tensors",
    "generate": "tokens",
    "bench": "rounds",
    "evaluate": "windows",
    "tasks": "requests",
}
"""What the bar of a phase counts."""


def _linears(recent: tuple[Recent, ...], width: int) -> Table:
    wide = width >= WIDE
    headings = ["loss", "nearest", "change", "method"]
    if wide:
        headings = ["shape", *headings[:3], "damping", "seconds", headings[3]]
    method = METHOD_WIDTH if width >= NARROW else len("FALLBACK rtn")

    def taken() -> int:
        shapes = 34 - 2 * 9 if wide else 0  # a shape is wider than a number
        return 2 + shapes + sum((method if heading == "method" else 7) + 2 for heading in headings)

    for heading, least in (("nearest", NAME_WANTED), ("change", NAME_WANTED), ("method", NAME_FROM)):
        if taken() + least > width:
            headings.remove(heading)
    room = min(max(width - taken(), NAME_FROM), NAME_WIDTH)
    table = Table.grid(padding=(0, 2))
    table.add_column(width=room, no_wrap=True, overflow="ellipsis")
    for heading in headings:
        left = heading == "method"
        justify: JustifyMethod = "left" if left else "right"
        table.add_column(justify=justify, no_wrap=True, min_width=method if left else 7)
    table.add_row(fmt.fitting((" last linears", " linears"), room), *headings, style="bold")
    for item in reversed(recent):
        report = item.report
        name = fmt.shorten_name(fmt.short_linear(report.name, item.block), room - 1)
        cells = {
            "shape": f"{report.out_features} x {report.in_features}",
            "loss": fmt.loss(report.loss),
            "nearest": fmt.loss(report.rtn_loss),
            "change": fmt.change(report.loss, report.rtn_loss),
            "damping": f"{report.damp_percent:g}",
            "seconds": f"{report.seconds:.2f}",
            "method": method_text(report.method, report.attempts),
        }
        style = "bold red" if report.method != "gptq" else ""
        table.add_row(f" {name}", *(cells[heading] for heading in headings), style=style)
    return table


def method_text(method: str, attempts: int) -> str:
    """`gptq`, `gptq, 2 tries`, `FALLBACK rtn`: a fallback is shown by a word, too."""
    if method != "gptq":
        return f"FALLBACK {method}"
    return method if attempts == 1 else f"{method}, {attempts} tries"


def memory_line(memory: DeviceMemory, width: int, rank: RankState | None = None) -> Text:
    """One device: a bar of allocated, reserved and total, and the figures, each with its glyph. `rank`: of
    another process, whose name stands in front."""
    total = max(memory.total_bytes, 1)
    high = memory.peak_bytes > NEARLY_FULL * total
    room = width - LABEL_WIDTH - 4
    texts = _memory_texts(memory, "  NEARLY FULL" if high else "")
    if rank is not None:
        texts = (f"{texts[0]}  {memory.device} on {rank.host}", f"{texts[1]}  {memory.device}", *texts)
    figures = fmt.fitting(texts, room - BAR_FROM)
    cells = max(1, min(BAR_WIDTH * max(1, width // 80), room - len(figures)))
    label = memory.device if rank is None else f"rank {rank.rank}"
    line = Text(f" {label:<{LABEL_WIDTH - 1}} ", style="bold", no_wrap=True, overflow="ellipsis")
    allocated = min(cells, round(cells * memory.allocated_bytes / total))
    reserved = min(cells, max(allocated, round(cells * memory.reserved_bytes / total)))
    line.append("█" * allocated, style="cyan not bold")
    line.append("▓" * (reserved - allocated), style="blue not bold")
    line.append("░" * (cells - reserved), style="dim not bold")
    return line.append(f"  {figures}", style="bold red" if high else "not bold")


def _memory_texts(memory: DeviceMemory, full: str) -> tuple[str, ...]:
    """The figures of a device, with the glyphs of its bar: from all of them to the one that counts."""
    total = f"of {fmt.gib(memory.total_bytes)} GiB{full}"
    peak = f"peak {fmt.gib(memory.peak_bytes)} {total}"
    held, reserved = fmt.gib(memory.allocated_bytes), fmt.gib(memory.reserved_bytes)
    least = (f"█ {held}  {peak}", peak, f"{held} {total}", f"{held} GiB{full}")
    if memory.device == "cpu":  # no allocator of its own: what is resident is all that is reserved
        return f"█ resident {held}  {peak}", *least
    return f"█ allocated {held}  ▓ reserved {reserved}  {peak}", f"█ {held}  ▓ {reserved}  {peak}", *least
