"""Plots as inline SVG: series of points over an axis of indices, linear or logarithmic, without a library.

Colours come from the page's CSS classes `s0`, `s1`, …, so that one drawing works in light and dark mode.
Every series has a mark of its own (disc, ring, triangle, bar), so that no colour is needed. A plot has a
title and a description for screen readers, and every point a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 760, 260
LEFT, RIGHT, TOP, BOTTOM = 74, 16, 34, 46
MAX_TICKS = 6

Mark = Literal["disc", "ring", "triangle", "bar", "line", "dashes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values over x = 0, 1, 2, …; None leaves a gap. `labels` are tooltips, one per value."""

    name: str
    values: tuple[float | None, ...]
    mark: Mark
    style: int
    """Number of the CSS class."""
    labels: tuple[str, ...] = ()


COLOURS = ("#1f6feb", "#8a6d00", "#c4290a", "#0a7f42"), ("#79b1ff", "#e0b84c", "#ff8b6b", "#63d19b")
"""Of the series, on light and on dark paper."""


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    log: bool

    def y(self, value: float) -> float:
        if self.log:
            share = math.log10(value / self.low) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    @property
    def ticks(self) -> list[float]:
        if self.log:
            decades = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            step = -(-len(decades) // MAX_TICKS)
            return [10.0**decade for decade in decades[::step]]
        width = nice_step(self.high / MAX_TICKS)
        return [width * index for index in range(int(self.high / width + 1e-9) + 1)]


def nice_step(minimum: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `minimum`."""
    if minimum <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(minimum))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= minimum * (1 - 1e-12))


def plot(
    title: str,
    description: str,
    series: Sequence[Series],
    *,
    x_names: Sequence[str],
    unit: Callable[[float], str],
    log: bool = False,
) -> str:
    """An `<svg>` of `series`. `x_names`: the block at each x; `unit` formats a value of y."""
    shown = [
        value
        for one in series
        for value in one.values
        if value is not None and math.isfinite(value) and (value > 0 or not log)
    ]
    if not shown:
        return f"<p>{escape(title)}: nothing to show.</p>"
    scale = _scale(shown, log=log)
    places = max(len(one.values) for one in series)
    slug = "".join(c if c.isalnum() else "-" for c in title.lower())
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{slug}-t {slug}-d">',
        f'<title id="{slug}-t">{escape(title)}</title><desc id="{slug}-d">{escape(description)}</desc>',
        *_axes(scale, places, x_names, unit),
    ]
    for one in series:
        parts += _draw(one, scale, places, unit)
    return "\n".join([*parts, *_legend(series), "</svg>"])


def _scale(values: Sequence[float], *, log: bool) -> _Scale:
    if log:
        low = math.floor(math.log10(min(values)))
        high = math.ceil(math.log10(max(values)))
        return _Scale(10.0**low, 10.0 ** max(high, low + 1), log=True)
    step = nice_step(max(max(values), 1e-9) / MAX_TICKS)
    return _Scale(0.0, step * math.ceil(max(max(values), 1e-9) / step - 1e-9), log=False)


def _x(index: int, places: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / places


def _axes(scale: _Scale, places: int, x_names: Sequence[str], unit: Callable[[float], str]) -> list[str]:
    parts = []
    for tick in scale.ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(unit(tick))}</text>'
        )
    step = max(1, -(-places // 12))
    for index in range(0, min(places, len(x_names)), step):
        at = f'x="{_x(index, places):.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text class="tick" {at} text-anchor="middle">{escape(x_names[index])}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">block</text>')
    return parts


def _draw(series: Series, scale: _Scale, places: int, unit: Callable[[float], str]) -> list[str]:
    points = [
        (index, _x(index, places), scale.y(value), value)
        for index, value in enumerate(series.values)
        if value is not None and math.isfinite(value) and (value > 0 or not scale.log)
    ]
    if series.mark in ("line", "dashes") and len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for _, x, y, _ in points)
        return [f'<polyline class="s{series.style} {series.mark}" points="{path}"/>']
    parts = []
    for index, x, y, value in points:
        label = series.labels[index] if index < len(series.labels) else unit(value)
        shape = _shape(series.mark, x, y, places)
        tooltip = f"<title>{escape(label)}</title>"
        parts.append(f'<g class="s{series.style} {series.mark}">{tooltip}{shape}</g>')
    return parts


def _shape(mark: Mark, x: float, y: float, places: int) -> str:
    if mark == "bar":
        width = min(40.0, 0.7 * (WIDTH - LEFT - RIGHT) / places)
        height = HEIGHT - BOTTOM - y
        return f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
    if mark == "triangle":
        return f'<path d="M{x:.1f} {y - 6:.1f} l6 10 h-12 z"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if mark == "disc" else 3.5}"/>'


def _legend(series: Sequence[Series]) -> list[str]:
    parts, x = [], float(LEFT)
    for one in series:
        if one.mark in ("line", "dashes"):
            parts.append(
                f'<polyline class="s{one.style} {one.mark}" points="{x - 2:.1f},16 {x + 14:.1f},16"/>'
            )
        else:
            mark: Mark = "disc" if one.mark == "bar" else one.mark
            parts.append(f'<g class="s{one.style} {mark}">{_shape(mark, x + 6, 16, 1)}</g>')
        parts.append(f'<text class="legend" x="{x + 20:.1f}" y="20">{escape(one.name)}</text>')
        x += 40 + 6.6 * len(one.name)
    return parts


def standalone(svg: str) -> str:
    """A plot as a file of its own, with its colours in it; "" for what is not a plot."""
    if not svg.startswith("<svg "):
        return ""
    opened = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    before, end, after = opened.partition("</desc>")
    return f"{before}{end}\n<style>{_style()}</style>{after}\n"


def _style() -> str:
    light, dark = COLOURS
    rules = [
        "text { font: 12px system-ui, sans-serif; fill: #5b6470; } text.legend { fill: #1b1f24; }",
        ".grid { stroke: #d5dae0; } .ring, .line, .dashes { fill: none !important; }",
        ".ring { stroke-width: 1.5; } .line, .dashes { stroke-width: 2; } .dashes { stroke-dasharray: 6 4; }",
        *(f".s{n} {{ fill: {colour}; stroke: {colour}; }}" for n, colour in enumerate(light)),
    ]
    night = [
        "text { fill: #a2abb6; } text.legend { fill: #e6e9ed; } .grid { stroke: #333a42; }",
        *(f".s{n} {{ fill: {colour}; stroke: {colour}; }}" for n, colour in enumerate(dark)),
    ]
    return f"{' '.join(rules)} @media (prefers-color-scheme: dark) {{ {' '.join(night)} }}"
