"""Plots as inline SVG: series of values over an axis of places, linear or logarithmic, without a library.

Every series has a mark of its own, so that no colour is needed; colours are CSS classes `s0`, `s1`, …, so
that one drawing works in light and dark mode. A plot has a title and a description for those who hear it, and
its points have tooltips. `responsive` draws it twice, wide and narrow, and CSS shows the one that fits: a
drawing that is scaled down to a telephone has letters that nobody can read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Mark = Literal["disc", "square", "diamond", "triangle", "cross", "ring", "tick", "bar", "line", "dashes"]
POINTS: tuple[Mark, ...] = ("disc", "square", "triangle", "diamond", "cross")
"""Marks that can be told apart beside each other."""
MAX_TICKS = 6
MIN_DRAWN, MAX_DRAWN = 1e-100, 1e100
"""Values beyond these have no place: the arithmetic of the axis would leave the range of floats."""
LEFT, RIGHT, BOTTOM = 58, 10, 44
_LEGEND_LINE, _LETTER = 20, 6.6
"""Pixels of a line of the legend, and of a letter on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values over x = 0, 1, 2, …; None leaves a gap. `labels` are tooltips, one per value."""

    name: str
    values: tuple[float | None, ...]
    mark: Mark
    style: int
    """Number of the CSS class."""
    labels: tuple[str, ...] = ()
    joined: bool = False
    """A faint line leads from mark to mark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """What is to be drawn. `x_names`: the name of each place; `unit` formats a value of y."""

    title: str
    description: str
    series: Sequence[Series]
    x_names: Sequence[str]
    unit: Callable[[float], str]
    log: bool = False
    x_title: str = "block"

    @property
    def shown(self) -> list[float]:
        """The values that can be drawn."""
        return [x for one in self.series for x in one.values if x is not None and self.can_draw(x)]

    def can_draw(self, value: float) -> bool:
        """Whether a value has a place on the axis."""
        return MIN_DRAWN <= value <= MAX_DRAWN if self.log else abs(value) <= MAX_DRAWN

    @property
    def places(self) -> int:
        """Places on the axis of x."""
        return max(len(one.values) for one in self.series)


@dataclass(frozen=True, slots=True)
class Size:
    """Pixels of a drawing, and how many names fit below it."""

    name: str
    width: int
    height: int
    names: int


WIDE, NARROW = Size("wide", 848, 300, 16), Size("narrow", 352, 260, 7)


@dataclass(frozen=True, slots=True)
class Scale:
    """From a value to its height in the drawing."""

    low: float
    high: float
    log: bool
    top: float
    bottom: float

    def y(self, value: float) -> float:
        """Pixels from the upper edge."""
        if self.log:
            share = math.log10(value / self.low) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * share

    @property
    def ticks(self) -> list[float]:
        """Round values, from low to high."""
        if not self.log:
            width = nice_step(self.high / MAX_TICKS)
            return [width * index for index in range(int(self.high / width + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 3 else (1,)
        every = [10.0**decade * factor for decade in decades for factor in factors]
        inside = [value for value in every if self.low * 0.999 <= value <= self.high * 1.001]
        return inside[:: -(-len(inside) // (MAX_TICKS + 2))]


def nice_step(minimum: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `minimum`."""
    if minimum <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(minimum))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= minimum * (1 - 1e-12))


def responsive(plot: Plot) -> str:
    """The plot for wide and for narrow windows; CSS hides one of them, also from a screen reader."""
    return "\n".join(drawing(plot, size) for size in (WIDE, NARROW)) if plot.shown else _nothing(plot)


def drawing(plot: Plot, size: Size = WIDE) -> str:
    """The plot as one `<svg>`."""
    if not plot.shown:
        return _nothing(plot)
    legend = list(_legend(plot.series, size))
    top = _LEGEND_LINE * (1 + max((line for _, _, line in legend), default=0)) + 16
    scale = _scale(plot, top, size.height - BOTTOM)
    slug = "".join(c if c.isalnum() else "-" for c in plot.title.lower()) + f"-{size.name}"
    parts = [
        f'<svg class="{size.name}" viewBox="0 0 {size.width} {size.height}" role="img" '
        f'aria-labelledby="{slug}-t {slug}-d">',
        f'<title id="{slug}-t">{escape(plot.title)}</title>'
        f'<desc id="{slug}-d">{escape(plot.description)}</desc>',
        *_axes(plot, scale, size),
    ]
    for one in plot.series:
        parts += _draw(one, plot, scale, size)
    for one, x, line in legend:
        parts += _legend_entry(one, x, 14 + _LEGEND_LINE * line)
    return "\n".join([*parts, "</svg>"])


def _nothing(plot: Plot) -> str:
    return f"<p>{escape(plot.title)}: nothing to show.</p>"


def _scale(plot: Plot, top: float, bottom: float) -> Scale:
    least, most = min(plot.shown), max(plot.shown)
    if plot.log:
        high = nice_step(most)
        low = 1 / nice_step(1 / least)  # 1, 2, 5 mirrored are 1, 1/2, 1/5: the largest that is at most it
        return Scale(min(low, high / 10), high, True, top, bottom)
    step = nice_step(max(most, 1e-9) / MAX_TICKS)
    return Scale(0.0, step * math.ceil(max(most, 1e-9) / step - 1e-9), False, top, bottom)


def _x(index: float, places: int, size: Size) -> float:
    return LEFT + (size.width - LEFT - RIGHT) * (index + 0.5) / places


def _axes(plot: Plot, scale: Scale, size: Size) -> Iterator[str]:
    right, bottom = size.width - RIGHT, scale.bottom
    for tick in scale.ticks:
        y = scale.y(tick)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        label = escape(plot.unit(tick))
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    step = max(1, round(nice_step(plot.places / size.names)))
    for index in range(0, min(plot.places, len(plot.x_names)), step):
        x = _x(index, plot.places, size)
        yield f'<path class="axis" d="M{x:.1f} {bottom:.1f}v4"/>'
        name = escape(plot.x_names[index])
        yield f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{name}</text>'
    yield f'<path class="axis" d="M{LEFT} {bottom:.1f}H{right}"/>'
    yield f'<text x="{right}" y="{bottom + 36:.1f}" text-anchor="end">{escape(plot.x_title)}</text>'


def _draw(series: Series, plot: Plot, scale: Scale, size: Size) -> Iterator[str]:
    points = [
        (index, _x(index, plot.places, size), scale.y(value), value)
        for index, value in enumerate(series.values)
        if value is not None and plot.can_draw(value)
    ]
    lines = series.mark in ("line", "dashes")
    if len(points) > 1 and (lines or series.joined):
        path = " ".join(f"{x:.1f},{y:.1f}" for _, x, y, _ in points)
        yield f'<polyline class="s{series.style} {series.mark if lines else "joined"}" points="{path}"/>'
    if lines and len(points) > 1:
        return
    for index, x, y, value in points:
        label = series.labels[index] if index < len(series.labels) else plot.unit(value)
        shape = _bar(x, y, plot.places, scale, size) if series.mark == "bar" else _shape(series.mark, x, y)
        tooltip = f"<title>{escape(label)}</title>"
        yield f'<g class="s{series.style} {series.mark}">{tooltip}{shape}</g>'


def _bar(x: float, y: float, places: int, scale: Scale, size: Size) -> str:
    width = min(36.0, 0.72 * (size.width - LEFT - RIGHT) / places)
    at = f'x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{scale.bottom - y:.1f}"'
    return f'<rect {at} rx="{min(2.0, width / 4):.1f}"/>'


def _shape(mark: Mark, x: float, y: float) -> str:
    """A point of about eight pixels."""
    match mark:
        case "square":
            return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
        case "diamond":
            return f'<path d="M{x:.1f} {y - 4.4:.1f}l4.4 4.4-4.4 4.4-4.4-4.4z"/>'
        case "triangle":
            return f'<path d="M{x:.1f} {y - 4.5:.1f}l4.4 7.5h-8.8z"/>'
        case "cross":
            return f'<path d="M{x - 3:.1f} {y - 3:.1f}l6 6m0-6l-6 6"/>'
        case "tick":
            return f'<path d="M{x - 5:.1f} {y:.1f}h10"/>'
        case "ring":
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
        case _:
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'


def _legend(series: Iterable[Series], size: Size) -> Iterator[tuple[Series, float, int]]:
    """(series, pixels from the left edge, line) of each entry."""
    x, line = 8.0, 0
    for one in series:
        width = 34 + _LETTER * len(one.name)
        if x > 8.0 and x + width > size.width:
            x, line = 8.0, line + 1
        yield one, x, line
        x += width


def _legend_entry(series: Series, x: float, y: float) -> Iterator[str]:
    if series.mark in ("line", "dashes"):
        yield f'<polyline class="s{series.style} {series.mark}" points="{x:.1f},{y} {x + 16:.1f},{y}"/>'
    else:
        mark: Mark = "square" if series.mark == "bar" else series.mark
        yield f'<g class="s{series.style} {mark}">{_shape(mark, x + 8, y)}</g>'
    yield f'<text class="legend" x="{x + 22:.1f}" y="{y + 4}">{escape(series.name)}</text>'


def standalone(svg: str, style: str) -> str:
    """A drawing as a file of its own, with `style` in it; "" for what is not a drawing."""
    if not svg.startswith("<svg "):
        return ""
    opened = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    before, end, after = opened.partition("</desc>")
    return f"{before}{end}\n<style>{style}</style>{after}\n"
