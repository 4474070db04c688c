"""The map report as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_cli.display.maps import bar_segments, guides, map_summary
from gptq_cli.results.map import DEVICE_PARTS, DevicePlan
from tests.display.map_reports import CARD, fits, planned, refused
from tests.display.test_tables import rendered
from tests.golden import check_golden

SIZES = st.integers(0, 2**40)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("report", [fits(), refused(), planned()], ids=["fits", "refused", "planned"])
def test_the_map_report(report: object, width: int, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id.split("-")[0]
    check_golden(f"maps/{name}_{width}.txt", rendered(map_summary(report), width))  # type: ignore[arg-type]


def test_the_verdict_comes_last() -> None:
    assert rendered(map_summary(fits())).endswith(" verdict: fits with warnings\n")
    assert rendered(map_summary(refused())).endswith(" verdict: refused\n")


def test_too_much_is_said_in_words() -> None:
    assert "DOES NOT FIT, 2.68 GiB too much" in rendered(map_summary(refused()))
    assert "DOES NOT FIT" not in rendered(map_summary(fits()))


def test_the_lines_of_a_tree() -> None:
    assert guides([0, 1, 1, 2, 2, 1, 0]) == ["", "├─ ", "├─ ", "│  ├─ ", "│  └─ ", "└─ ", ""]
    assert guides([]) == []
    assert guides([0, 1, 2, 1, 2]) == ["", "├─ ", "│  └─ ", "└─ ", "   └─ "]


@given(
    st.lists(SIZES, min_size=len(DEVICE_PARTS), max_size=len(DEVICE_PARTS)),
    st.integers(1, 2**40),
    st.integers(1, 200),
)
def test_a_bar_is_always_as_long_as_asked(parts: list[int], limit: int, cells: int) -> None:
    held = dict(zip((name for name, _ in DEVICE_PARTS), parts, strict=True))
    plan = DevicePlan(device="cpu", total_bytes=limit, free_bytes=limit, limit_bytes=limit, **held)
    glyphs = "".join(glyphs for glyphs, _ in bar_segments(plan, cells))
    assert len(glyphs) == cells
    if plan.fits:
        assert "!" not in glyphs


def test_a_bar_shows_shares() -> None:
    glyphs = "".join(glyphs for glyphs, _ in bar_segments(CARD, 40))
    assert glyphs.count("█") == round(40 * CARD.weights_bytes / CARD.limit_bytes)
    assert glyphs.count("·") == round(40 * CARD.spare_bytes / CARD.limit_bytes)
    assert all(glyph in glyphs for glyph in "█▓▒░")
