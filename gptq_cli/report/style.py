"""How pages and plots look: one set of colours for light and one for dark paper.

Text has a contrast of at least 4.5 to 1 on its paper, marks and lines of plots at least 3 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

_LIGHT: Mapping[str, str] = MappingProxyType(
    {
        **{"ink": "#1a1e24", "soft": "#59626e", "paper": "#ffffff", "card": "#f5f7f9", "line": "#dde2e8"},
        **{"good": "#0b7043", "warn": "#8a5a00", "bad": "#b92d0c", "link": "#1d5fd1"},
        **{"s0": "#1d5fd1", "s1": "#8a93a0", "s2": "#b92d0c", "s3": "#0b7a48", "s4": "#7a3fc4"},
        **{"s5": "#96690a", "s6": "#b8327f", "s7": "#0b7285", "s8": "#5f7d0a"},
    }
)
_DARK: Mapping[str, str] = MappingProxyType(
    {
        **{"ink": "#e8ebef", "soft": "#a3adb9", "paper": "#13161a", "card": "#1b2026", "line": "#2f3740"},
        **{"good": "#63d19b", "warn": "#e3b341", "bad": "#ff8a6b", "link": "#7fb0ff"},
        **{"s0": "#7fb0ff", "s1": "#77818d", "s2": "#ff8a6b", "s3": "#5fd39a", "s4": "#b99bff"},
        **{"s5": "#e3b341", "s6": "#ff8ac5", "s7": "#5cc8dc", "s8": "#b7d95c"},
    }
)
BASELINE, BAD = 1, 2
"""Numbers of the classes of what is compared with, and of what went wrong."""
COLOURS = (0, 3, 4, 5, 6, 7, 8)
"""Numbers of the classes of everything else."""

_PLOTS = """
text { font: 12px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
text.legend { fill: var(--ink); }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); } .grid, .axis { fill: none; }
.line, .dashes, .joined, .cross, .tick, .ring { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashes { stroke-dasharray: 5 4; stroke-width: 1.5; } .joined { stroke-width: 1; stroke-opacity: .35; }
.tick, .ring { stroke-width: 1.5; }
.disc, .square, .triangle, .diamond, .bar { stroke: none; }
"""
_PAGE = """
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
main { max-width: 56rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .75rem; font-weight: 650; }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem; font-weight: 650; }
h1, h3, p, li, dd, summary { overflow-wrap: anywhere; } td, th { overflow-wrap: break-word; }
p { margin: .4rem 0; } .soft, .lede { color: var(--soft); } .lede { margin: .4rem 0 0; }
nav { margin: 1.25rem 0 0; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .9rem; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
         margin: 1.75rem 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-weight: 650;
          font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.good, .warn, .bad, .best { font-weight: 650; }
dl { display: grid; grid-template-columns: minmax(9rem, max-content) minmax(0, 1fr); gap: .3rem 1.5rem;
     margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
code, pre { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
pre { margin: .5rem 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
      border-radius: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.75rem; } figcaption { color: var(--soft); font-size: .9rem; margin: 0 0 .5rem; }
svg { width: 100%; height: auto; display: block; } svg.narrow { display: none; }
svg.strip { height: 3.5rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: baseline; padding: .35rem .9rem .35rem 0;
         border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; } tbody th { font-weight: 400; }
th.n, td.n { text-align: right; white-space: nowrap; } th:last-child, td:last-child { padding-right: 0; }
td.name, th.name { min-width: 9rem; }
.meter { display: block; height: .3rem; border-radius: .15rem; background: var(--s0);
         margin: .2rem 0 0 auto; }
ul.findings { list-style: none; padding: 0; margin: .5rem 0; }
.findings li { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .9rem; margin: 0 0 .9rem; }
.findings li.error { border-color: var(--bad); } .findings li.warning { border-color: var(--warn); }
summary { cursor: pointer; color: var(--link); margin: .75rem 0; }
footer { margin: 3.5rem 0 0; color: var(--soft); font-size: .85rem; }
@media (max-width: 640px) {
  main { padding: 1.5rem 1.1rem 3rem; } h1 { font-size: 1.4rem; } h2 { margin-top: 2.25rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; } .tile { padding: .65rem .8rem; }
  .tile b { font-size: 1.2rem; } dl { display: block; } dd { margin: 0 0 .5rem; }
  svg.wide { display: none; } svg.narrow { display: block; }
}
@media print { nav { display: none; } figure, .tile, tr, li { break-inside: avoid; } }
"""


def page_style() -> str:
    """The style sheet of a page."""
    plots = "\n".join(f"svg {rule}" for rule in _rules(_PLOTS + _classes()))
    root = ":root { color-scheme: light dark; " + _variables(_LIGHT) + " }"
    return f"{root}\n{_night(_variables(_DARK))}\n{_PAGE.strip()}\n{plots}\n"


def plot_style() -> str:
    """The style sheet of a plot in a file of its own, with plain colours: not all that draw SVG know
    variables."""
    rules = "\n".join(_rules(_PLOTS + _classes()))
    night = "\n".join(rule for rule in _rules(_PLOTS + _classes()) if "var(" in rule)
    return f"{_plain(rules, _LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_plain(night, _DARK)}\n}}\n"


def _plain(rules: str, colours: Mapping[str, str]) -> str:
    return re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], rules)


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _night(variables: str) -> str:
    return f"@media (prefers-color-scheme: dark) {{ :root {{ {variables} }} }}"


def _classes() -> str:
    """A rule per class: filled for marks, drawn for lines."""
    numbers = sorted({BASELINE, BAD, *COLOURS})
    drawn = ("line", "dashes", "joined", "cross", "tick", "ring")
    return "\n".join(
        f".s{n} {{ fill: var(--s{n}); stroke: var(--s{n}); }}\n"
        + ", ".join(f".s{n}.{mark}" for mark in drawn)
        + " { fill: none; }"
        for n in numbers
    )


def _rules(sheet: str) -> list[str]:
    """One rule a line: `a, b { … } c { … }` in the lines of a sheet, each selector on its own."""
    found = []
    for rule in sheet.split("}"):
        selectors, brace, body = rule.partition("{")
        if brace:
            found += [f"{one.strip()} {{{' '.join(body.split())}}}" for one in selectors.split(",")]
    return found
