"""Sources of calibration text with weights: read, refused, shared out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_cli.config import CalibrationConfig
from gptq_cli.errors import ConfigError
from gptq_cli.text_sources import TextSource, interleaved, parse_sources, shares

WEIGHTS = st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("pydoc", "pydoc", 1.0),
        ("pydoc*0.5", "pydoc", 0.5),
        ("chat.jsonl:messages*.25", "chat.jsonl:messages", 0.25),
        ("id:config:split:column*3", "id:config:split:column", 3.0),
        ("a*b.txt*1", "a*b.txt", 1.0),
        ("x*1e-2", "x", 0.01),
    ],
)
def test_a_weight_stands_behind_the_last_star(text: str, name: str, weight: float) -> None:
    source = TextSource.parse(text)
    assert source == TextSource(name, weight)
    assert TextSource.parse(str(source)) == source


@pytest.mark.parametrize("weight", ["0", "-1", "half", "", "nan", "inf", "1e999", "0.0", "5%", "1_0", "٣"])
def test_a_weight_that_is_no_positive_number_is_refused(weight: str) -> None:
    with pytest.raises(
        ConfigError, match=r"the weight of 'pydoc' is .*; allowed: a number above 0"
    ) as caught:
        parse_sources(f"pydoc*{weight}")
    assert "a number above 0, as in pydoc*0.5" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), "names 0 sources; allowed: 1 to 64"),
        (["pydoc", "pydoc*2"], "names 'pydoc' 2 times; allowed: each source once"),
        ("", "calibration is empty"),
        (["a", ""], "calibration is empty"),
        ("*0.5", "calibration is empty"),
        (3, "calibration is 3; allowed"),
        ([3], "calibration holds 3; allowed"),
        ([f"file{number}" for number in range(65)], "names 65 sources"),
    ],
)
def test_what_is_no_list_of_sources_is_refused(given: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_sources(given)


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    (source,) = parse_sources(tmp_path / "a*2")
    assert source == TextSource(str(tmp_path / "a*2"), 1.0)


def test_fewer_samples_than_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match="samples is 1; allowed: a whole number of at least 2") as caught:
        CalibrationConfig.of(["a", "b"], samples=1)
    assert caught.value.hint == "one window for each source"


@given(WEIGHTS, st.integers(0, 300))
def test_every_source_gets_its_share_and_at_least_one_window(weights: list[float], more: int) -> None:
    total = len(weights) + more
    found = shares(weights, total)
    assert sum(found) == total
    assert min(found) >= 1
    for one, weight in zip(found, weights, strict=True):
        assert one >= min(1, int(total * weight / sum(weights)) - len(weights))
        assert one <= total * weight / sum(weights) + 2


def test_shares_of_known_weights() -> None:
    assert shares([1, 1], 128) == (64, 64)
    assert shares([0.7, 0.2, 0.1], 10) == (7, 2, 1)
    assert shares([3, 1], 4) == (3, 1)
    assert shares([1e308, 1e308], 8) == (4, 4)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_every_stretch_holds_every_source_by_its_share(counts: list[int]) -> None:
    order = interleaved(counts)
    assert sorted(order) == [(s, i) for s, count in enumerate(counts) for i in range(count)]
    for end in range(1, len(order) + 1):
        for source, count in enumerate(counts):
            held = sum(one == source for one, _ in order[:end])
            assert abs(held - end * count / len(order)) < len(counts)


@pytest.mark.parametrize("weight", [0.5, 3.0, 1e-7, 0.123456789012, 1234567.25, 1e22, 1 / 3])
def test_a_source_is_written_as_it_is_read(weight: float) -> None:
    source = TextSource("a*b.txt", weight)
    assert TextSource.parse(str(source)) == source
