"""Reports become JSON without losing or inventing anything."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from gptq_cli.results.document import SCHEMA_VERSION, document, to_json
from gptq_cli.results.load import KernelCount
from gptq_cli.results.run import BlockReport


@dataclass(frozen=True)
class Plan:
    """Private fields stay private; chosen properties come along."""

    json_properties: ClassVar[tuple[str, ...]] = ("half",)
    whole: int
    _cache: object = None

    @property
    def half(self) -> float:
        return self.whole / 2


@dataclass(frozen=True)
class Named:
    """A value with a text form of its own, as Device has."""

    index: int

    def __str__(self) -> str:
        return f"cuda:{self.index}"


def test_pairs_become_an_object_and_nested_tuples_stay_lists() -> None:
    block = BlockReport(name="b", seconds=1.5, peak_bytes=(("cuda:0", 7), ("cpu", 9)), linears=())
    assert to_json(block) == {
        "name": "b",
        "seconds": 1.5,
        "peak_bytes": {"cuda:0": 7, "cpu": 9},
        "linears": [],
    }
    assert to_json((("q", "k"), ("o",))) == [["q", "k"], ["o"]]


def test_no_pairs_are_an_empty_object() -> None:
    assert document(BlockReport(name="b", seconds=0.0, peak_bytes=(), linears=()))["peak_bytes"] == {}


def test_a_value_with_its_own_text_is_written_as_that_text() -> None:
    assert to_json((Named(1),)) == ["cuda:1"]


def test_private_fields_stay_and_named_properties_come_along() -> None:
    assert to_json(Plan(3, _cache=object())) == {"whole": 3, "half": 1.5}


def test_what_json_does_not_know_becomes_null() -> None:
    held = to_json([float("nan"), float("inf"), -float("inf"), 0.5])
    assert held == [None, None, None, 0.5]
    json.dumps(held, allow_nan=False)


def test_a_document_names_its_schema_first() -> None:
    written = document(KernelCount(kernel="torch", linears=2, reason="always"))
    assert list(written) == ["schema_version", "kernel", "linears", "reason"]
    assert written["schema_version"] == SCHEMA_VERSION


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x"])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="a report cannot hold"):
        to_json(value)


def test_a_document_is_made_of_a_report_only() -> None:
    with pytest.raises(TypeError, match="not of list"):
        document([1])
