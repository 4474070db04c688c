"""Which experts the calibration text reached: a table of the layers, and a strip of bars for each."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from gptq_cli.display import format as fmt
from gptq_cli.report.html import Cell, Markup, folded, heading, paragraph, table
from gptq_cli.results.run import ExpertsReport, RunReport, tokens_of_experts
from gptq_cli.wording import names_text

EXPLAINED = (
    "An expert learns its scales from the tokens that the router sends to it. One that saw fewer than its "
    "linears have columns borrows from the other experts of its layer; one that saw none takes all from them."
)
_OPEN = 4
"""Strips that are shown at once; those of more layers are folded."""
_NAMED = 8


def experts(report: RunReport) -> list[Markup]:
    """The section about experts; empty for a model without any."""
    layers: dict[str, tuple[ExpertsReport, Mapping[str, int]]] = {}
    for block in report.blocks:
        found = ExpertsReport.of(block.linears)
        if found is not None:
            layers[block.name] = found, tokens_of_experts(block.linears)
    if not layers or report.experts is None:
        return []
    rows = [
        (
            name,
            str(found.experts),
            f"{found.least_tokens:,}",
            f"{found.median_tokens:,}",
            f"{found.most_tokens:,}",
            Cell(str(found.few), "warn" if found.few else ""),
            Cell(str(len(found.unreached)), "bad" if found.unreached else ""),
        )
        for name, (found, _) in layers.items()
    ]
    heads = ("layer", "experts", "fewest", "median", "most", "too few", "never")
    strips = [_layer(name, found, tokens) for name, (found, tokens) in layers.items()]
    inside = Markup("\n".join(strips))
    return [
        paragraph(f"There are {fmt.experts(report.experts)}."),
        paragraph(EXPLAINED),
        table(heads, rows, "Calibration tokens of the experts of each layer"),
        inside if len(strips) <= _OPEN else folded(f"Tokens per expert in {len(strips)} layers", inside),
    ]


def _layer(name: str, found: ExpertsReport, tokens: Mapping[str, int]) -> str:
    few = f"; too few for {found.few}" if found.few else ""
    unreached = f"; never reached: {_short(found.unreached)}" if found.unreached else ""
    span = f"{found.least_tokens:,} to {found.most_tokens:,} tokens, median {found.median_tokens:,}"
    words = f"{span}{few}{unreached}."
    alternative = f"Tokens of each of {found.experts} experts of {name}: {words}"
    return f"{heading(name)}\n{_strip(alternative, tokens, found)}\n{paragraph(words, soft=True)}"


def _short(names: tuple[str, ...]) -> str:
    return names_text([name.rpartition(".")[2] for name in names], _NAMED)


def _strip(words: str, tokens: Mapping[str, int], found: ExpertsReport) -> str:
    """A bar for each expert, as high as its tokens; a full one in another colour where it saw none."""
    most = max(1, found.most_tokens)
    bars: dict[str, list[str]] = {"s0": [], "s2": []}
    for place, seen in enumerate(tokens.values()):
        height = 40 * seen / most if seen else 40
        bars["s0" if seen else "s2"].append(f"M{place + 0.5} 40v-{height:.1f}")
    paths = "".join(
        f'<path class="{style}" style="fill:none;stroke-width:{0.7 if style == "s0" else 0.25}" '
        f'd="{"".join(moves)}"/>'
        for style, moves in bars.items()
        if moves
    )
    box = f'viewBox="0 0 {len(tokens)} 40" preserveAspectRatio="none"'
    return f'<svg class="strip" {box} role="img" aria-label="{escape(words)}">{paths}</svg>'
