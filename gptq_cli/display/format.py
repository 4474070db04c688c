"""Numbers and names for people: three significant digits, binary units, names cut in the middle."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from gptq_cli.placement.device import format_size, three_digits
from gptq_cli.results.load import LoadReport
from gptq_cli.results.run import ExpertsReport, RunReport, Setting, TextShare
from gptq_cli.wording import names_text, number_of

ELLIPSIS = "…"
EXPERTS_NAMED = 4


size = format_size
"""`1536` -> `1.50 KiB`, as every message says it."""


def gib(size_bytes: float) -> str:
    """`2**30` -> `1.00`: gibibytes without the unit, for columns that name it once."""
    return three_digits(size_bytes / 2**30)


def duration(seconds: float) -> str:
    """`75.2` -> `1 min 15 s`; `nan`."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def clock(seconds: float | None) -> str:
    """`75.2` -> `0:01:15`; unknown -> `-:--:--`. The width is constant, so that its line does not move."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def group(group_size: int) -> str:
    """`group 64`, `one group per row`."""
    return "one group per row" if group_size == -1 else f"group {group_size}"


def loss(value: float) -> str:
    """A relative loss in at most seven characters: `0.0123`, `1.2e-05`, `nan`."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= value < 10:
        return f"{value:.4f}"
    return f"{value:.1e}"


def score(value: float | None) -> str:
    """Of a task: `0.4213`; empty where there is none."""
    return "" if value is None else f"{value:.4f}"


def ratio(value: float | None) -> str:
    """`1.25`; empty where there is none."""
    return "" if value is None else f"{value:.2f}"


def change(value: float, reference: float) -> str:
    """The relative difference of `value` from `reference`: `-61 %`, `+4 %`; empty where it is undefined."""
    if not (math.isfinite(value) and math.isfinite(reference)) or reference <= 0:
        return ""
    return f"{100 * (value / reference - 1):+.0f} %"


def share(fraction: float) -> str:
    """`0.8123` -> `81.2 %`."""
    return f"{100 * fraction:.1f} %"


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters, cut in the middle: the ends of a name tell the most."""
    if len(text) <= width:
        return text
    if width <= 1:
        return ELLIPSIS[:width]
    head = (width - 1) // 3
    return f"{text[:head]}{ELLIPSIS}{text[len(text) - (width - 1 - head) :]}"


def fitting(texts: Sequence[str], width: int) -> str:
    """The first of `texts`, the longest first, that is no longer than `width`; else the last, cut."""
    return next((text for text in texts if len(text) <= width), shorten(texts[-1], width))


def shorten_name(name: str, width: int) -> str:
    """A dotted name in at most `width` characters; components are removed first, from the second on.

    `model.layers.3.self_attn.q_proj` -> `model.….self_attn.q_proj` -> `….q_proj`.
    """
    parts = name.split(".")
    for kept in range(len(parts) - 1, 0, -1):
        if len(name) <= width:
            return name
        head = [parts[0], ELLIPSIS] if kept > 1 else [ELLIPSIS]
        tail = kept - 1 if kept > 1 else 1
        name = ".".join([*head, *parts[len(parts) - tail :]])
    return shorten(name, width)


def short_linear(name: str, block: str) -> str:
    """`model.layers.3.self_attn.q_proj` in block `model.layers.3` -> `3.self_attn.q_proj`."""
    prefix = block.rpartition(".")[0]
    return name.removeprefix(f"{prefix}.") if prefix else name


_TOKEN = re.compile(r"(?:[^\s\"']|\"[^\"]*\"|'[^']*')+")


def wrap_command(command: str, width: int) -> list[str]:
    """A command line in lines of `width` characters that can still be pasted: all but the last end in `\\`.

    Lines break between words, never between an option and its value, and never inside a word.
    """
    if len(command) <= width:
        return [command]
    groups: list[str] = []
    for token in _TOKEN.findall(command):
        if groups and groups[-1].startswith("--") and " " not in groups[-1] and not token.startswith("-"):
            groups[-1] += f" {token}"
        else:
            groups.append(token)
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + 1 + len(group) + 2 <= width:
            lines[-1] += f" {group}"
        else:
            lines.append(f"  {group}")
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def share_size(share: TextShare, report: RunReport) -> str:
    """`128 x 512 tokens`; where there are several sources, also the tokens and the share of all."""
    size = f"{share.samples} x {report.seq_len} tokens"
    if len(report.calibration_texts) == 1:
        return size
    part = f"{share.tokens / report.tokens:.0%}"
    return f"{share.samples} x {report.seq_len} = {share.tokens:,} tokens ({part})"


def setting(value: Setting) -> str:
    """The value of an option in words."""
    if value is None or value == ():
        return "default"
    if isinstance(value, tuple):
        return ", ".join(value)
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def evaluated(report: LoadReport, source: str) -> str:
    """`64 windows of 512 tokens of self, the answers alone`: what a perplexity was measured on."""
    of = f" of {source}" if source else ""
    alone = ", the answers alone" if report.answers_only else ""
    return f"{number_of(report.windows or 0, 'window')} of {report.seq_len or 0} tokens{of}{alone}"


def experts(found: ExpertsReport) -> str:
    """`64, which saw 0 to 912 calibration tokens (median 301); 5 saw fewer than they have columns; …`."""
    tokens = f"{found.least_tokens:,} to {found.most_tokens:,} calibration tokens"
    text = f"{found.experts}, which saw {tokens} (median {found.median_tokens:,})"
    if found.few:
        text += f"; {found.few} saw fewer than they have columns"
    if found.unreached:
        text += f"; no token reached {len(found.unreached)}: {names_text(found.unreached, EXPERTS_NAMED)}"
    return text
