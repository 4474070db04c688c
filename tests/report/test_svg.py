"""Plots are well-formed, say what they show, and put points where their values are."""

import xml.etree.ElementTree as ET

import pytest

from gptq_cli.report.svg import BOTTOM, NARROW, WIDE, Plot, Series, Size, drawing, nice_step, responsive


def plot(*series: Series, log: bool = False) -> Plot:
    names = [str(i) for i in range(max((len(one.values) for one in series), default=0))]
    return Plot(
        title="Loss & time",
        description="a < b",
        series=series,
        x_names=names,
        unit=lambda v: f"{v:g}",
        log=log,
    )


def drawn(*series: Series, log: bool = False, size: Size = WIDE) -> ET.Element:
    return ET.fromstring(drawing(plot(*series, log=log), size))


def circles(svg: ET.Element, style: str = "s0 disc") -> list[ET.Element]:
    found = [group.find("circle") for group in svg.iter("g") if group.get("class") == style]
    return [circle for circle in found if circle is not None][: -1 if found else None]  # the last: legend


def labels(svg: ET.Element, anchor: str) -> list[str]:
    return [text.text or "" for text in svg.iter("text") if text.get("text-anchor") == anchor]


@pytest.mark.parametrize(
    ("least", "step"), [(0, 1), (0.3, 0.5), (1, 1), (1.1, 2), (20, 20), (21, 50), (6e8, 1e9)]
)
def test_nice_step(least: float, step: float) -> None:
    assert nice_step(least) == pytest.approx(step)


def test_zero_is_at_the_bottom_and_the_middle_in_the_middle() -> None:
    svg = drawn(Series(name="a", values=(0.0, 5.0, 10.0), mark="disc", style=0))
    low, middle, high = (float(c.get("cy", "nan")) for c in circles(svg))
    assert low == WIDE.height - BOTTOM
    assert low - middle == pytest.approx(middle - high)
    assert high > 0


def test_a_decade_is_a_decade_on_a_logarithmic_axis() -> None:
    svg = drawn(Series(name="a", values=(0.01, 0.1, 1.0), mark="disc", style=0), log=True)
    low, middle, high = (float(c.get("cy", "nan")) for c in circles(svg))
    assert low - middle == pytest.approx(middle - high)


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ((0.0, 0.0021), False, ["0", "0.0005", "0.001", "0.0015", "0.002", "0.0025"]),
        ((3.0, 47.0), False, ["0", "10", "20", "30", "40", "50"]),
        ((0.0013, 0.0041), True, ["0.0005", "0.001", "0.002", "0.005"]),
        ((3e-5, 0.2), True, ["0.0001", "0.001", "0.01", "0.1"]),
    ],
)
def test_ticks_are_round(values: tuple[float, ...], log: bool, ticks: list[str]) -> None:
    svg = drawn(Series(name="a", values=values, mark="disc", style=0), log=log)
    assert labels(svg, "end")[:-1] == ticks  # the last: the name of the axis


@pytest.mark.parametrize(("places", "size", "step"), [(30, WIDE, 2), (30, NARROW, 5), (126, WIDE, 10)])
def test_blocks_are_named_at_round_steps(places: int, size: Size, step: int) -> None:
    svg = drawn(Series(name="a", values=(1.0,) * places, mark="line", style=0), size=size)
    assert labels(svg, "middle") == [str(i) for i in range(0, places, step)]


def test_what_cannot_be_drawn_is_left_out() -> None:
    values = (0.0, None, float("nan"), 0.5)
    svg = drawn(Series(name="a", values=values, mark="disc", style=0), log=True)
    assert len(circles(svg)) == 1
    assert "nothing to show" in responsive(plot())


def test_every_point_has_a_tooltip_and_the_plot_a_description() -> None:
    svg = drawn(Series(name="a", values=(1.0, 2.0), mark="ring", style=0, labels=("<one>", "two")))
    titles = [title.text for title in svg.iter("title")]
    assert titles == ["Loss & time", "<one>", "two"]
    assert svg.findtext("desc") == "a < b"
    assert svg.get("role") == "img"
    ids = {element.get("id") for element in svg}
    assert set((svg.get("aria-labelledby") or "").split()) <= ids


def test_one_point_of_a_line_is_a_point() -> None:
    svg = drawn(Series(name="a", values=(1.0,), mark="line", style=0))
    assert svg.find(".//g/circle") is not None


def test_series_differ_by_mark_and_not_only_by_colour() -> None:
    svg = drawn(
        Series(name="a", values=(1.0, 2.0), mark="triangle", style=0),
        Series(name="b", values=(1.0, 2.0), mark="bar", style=3),
    )
    assert len(svg.findall(".//g[@class='s0 triangle']/path")) == 3
    assert len(svg.findall(".//g[@class='s3 bar']/rect")) == 2


def test_nothing_leaves_the_drawing_however_long_the_legend_is() -> None:
    many = [Series(name=f"series number {n}", values=(1.0, 2.0), mark="disc", style=0) for n in range(12)]
    for size in (WIDE, NARROW):
        svg = drawn(*many, size=size)
        for text in svg.iter("text"):
            if text.get("class") == "legend":
                assert float(text.get("x", "nan")) + 6.6 * len(text.text or "") <= size.width
        legend = max(float(t.get("y", "nan")) for t in svg.iter("text") if t.get("class") == "legend")
        assert all(float(circle.get("cy", "nan")) < size.height for circle in svg.iter("circle"))
        points = [g.find("circle") for g in svg.iter("g") if g.find("title") is not None]
        assert min(float(c.get("cy", "nan")) for c in points if c is not None) > legend


def test_wide_and_narrow_have_names_of_their_own() -> None:
    both = responsive(plot(Series(name="a", values=(1.0, 2.0), mark="line", style=0)))
    ids = [e.get("id") for e in ET.fromstring(f"<div>{both}</div>").iter() if e.get("id")]
    assert len(ids) == 4
    assert len(set(ids)) == 4
