"""Plots are well-formed, say what they show, and put points where their values are."""

import xml.etree.ElementTree as ET

import pytest

from gptq_cli.report.svg import BOTTOM, HEIGHT, TOP, Series, nice_step, plot


def drawn(*series: Series, log: bool = False) -> ET.Element:
    names = [str(i) for i in range(len(series[0].values))]
    return ET.fromstring(
        plot("Loss & time", "a < b", series, x_names=names, unit=lambda v: f"{v:g}", log=log)
    )


def circles(svg: ET.Element, style: str = "s0 disc") -> list[ET.Element]:
    found = [group.find("circle") for group in svg.iter("g") if group.get("class") == style]
    return [circle for circle in found if circle is not None][: -1 if found else None]  # the last: legend


@pytest.mark.parametrize(
    ("least", "step"), [(0, 1), (0.3, 0.5), (1, 1), (1.1, 2), (20, 20), (21, 50), (6e8, 1e9)]
)
def test_nice_step(least: float, step: float) -> None:
    assert nice_step(least) == pytest.approx(step)


def test_zero_is_at_the_bottom_and_the_highest_tick_at_the_top() -> None:
    svg = drawn(Series(name="a", values=(0.0, 5.0, 10.0), mark="disc", style=0))
    heights = [float(c.get("cy", "nan")) for c in circles(svg)]
    assert heights == [HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2, TOP]


def test_a_decade_is_a_decade_on_a_logarithmic_axis() -> None:
    svg = drawn(Series(name="a", values=(0.01, 0.1, 1.0), mark="disc", style=0), log=True)
    low, middle, high = (float(c.get("cy", "nan")) for c in circles(svg))
    assert low - middle == pytest.approx(middle - high)


def test_what_cannot_be_drawn_is_left_out() -> None:
    values = (0.0, None, float("nan"), 0.5)
    svg = drawn(Series(name="a", values=values, mark="disc", style=0), log=True)
    assert len(circles(svg)) == 1
    assert "nothing to show" in plot("t", "d", [], x_names=[], unit=str)


def test_every_point_has_a_tooltip_and_the_plot_a_description() -> None:
    svg = drawn(Series(name="a", values=(1.0, 2.0), mark="ring", style=0, labels=("<one>", "two")))
    titles = [title.text for title in svg.iter("title")]
    assert titles == ["Loss & time", "<one>", "two"]
    assert svg.findtext("desc") == "a < b"
    assert svg.get("role") == "img"


def test_one_point_of_a_line_is_a_point() -> None:
    svg = drawn(Series(name="a", values=(1.0,), mark="line", style=0))
    assert svg.find(".//g/circle") is not None


def test_series_differ_by_mark_and_not_only_by_colour() -> None:
    svg = drawn(
        Series(name="a", values=(1.0, 2.0), mark="triangle", style=0),
        Series(name="b", values=(1.0, 2.0), mark="bar", style=1),
    )
    assert len(svg.findall(".//path")) == 3
    assert len(svg.findall(".//rect")) == 2
