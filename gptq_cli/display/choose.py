"""Which display: the live one for a person at a terminal, one line per event everywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TextIO

from gptq_cli.display.escapes import console_for
from gptq_cli.display.jsonl import JsonlDisplay
from gptq_cli.display.plain import PlainDisplay, WarningsDisplay
from gptq_cli.events import Observer, ignore

Progress = Literal["auto", "rich", "plain", "jsonl", "none"]


def is_live(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """True when `stream` is a terminal that can move its cursor and is not recorded as a log."""
    ci = environ.get("CI", "").lower() not in ("", "0", "false", "no")
    dumb = environ.get("TERM", "").lower() in ("dumb", "unknown")
    return stream.isatty() and not ci and not dumb


def choose(
    progress: Progress,
    *,
    quiet: bool,
    stream: TextIO,
    environ: Mapping[str, str],
    beside_text: bool = False,
) -> AbstractContextManager[Observer]:
    """A context manager that gives the observer for `progress`, writing to `stream`.

    Each of them shows warnings; only `quiet` silences them, together with everything else.

    `beside_text`: generated text is written to the same terminal; a live display is hidden meanwhile.
    """
    if quiet:
        return nullcontext(ignore)
    if progress == "none":
        return WarningsDisplay(stream)
    if progress == "auto":
        progress = "rich" if is_live(stream, environ) else "plain"
    if progress == "plain":
        return PlainDisplay(stream)
    if progress == "jsonl":
        return JsonlDisplay(stream)
    from gptq_cli.display.live import breaks_lines
    from gptq_cli.display.rich import RichDisplay

    console = console_for(stream, least_width=1)  # what moves must not be wider than the terminal
    return RichDisplay(console, beside_text=beside_text, breaks_lines=breaks_lines(environ))
