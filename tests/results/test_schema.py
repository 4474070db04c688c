"""A schema says what `to_json` writes: no more, no less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jsonschema
import pytest

from gptq_cli.results.document import document
from gptq_cli.results.schema import Definitions, schema_of


@dataclass(frozen=True)
class Named:
    """A value with a text form of its own."""

    index: int

    def __str__(self) -> str:
        return f"cuda:{self.index}"


@dataclass(frozen=True)
class Part:
    """One part.

    More about it, which no reader of a schema needs.
    """

    name: str
    """Its full
    name."""
    size: float | None


@dataclass(frozen=True)
class Whole:
    """All parts."""

    json_properties: ClassVar[tuple[str, ...]] = ("ok",)

    kind: Literal["a", "b"]
    device: Named
    parts: tuple[Part, ...]
    sizes: tuple[tuple[str, int], ...]
    shapes: tuple[tuple[str, int, int], ...]
    best: Part | None = None
    value: str | int | bool | None = None
    _cache: object = None

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return True


SCHEMA = schema_of(Whole, "whole", "for this test")
GIVEN: dict[str, Any] = {
    "kind": "a",
    "device": Named(1),
    "parts": (Part("p", 1.5), Part("q", float("nan"))),
    "sizes": (("p", 1),),
    "shapes": (("p", 2, 3),),
}


def test_a_document_is_what_its_schema_says() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for more in ({}, {"best": Part("p", 1)}, {"value": "text"}, {"value": 3}, {"sizes": ()}):
        jsonschema.validate(document(Whole(**GIVEN | more)), SCHEMA)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "c"),
        ("device", 1),
        ("parts", [{"name": "p"}]),
        ("parts", [{"name": "p", "size": 1, "colour": "red"}]),
        ("sizes", {"p": "large"}),
        ("shapes", [["p", 2]]),
        ("shapes", [["p", 2, 3, 4]]),
        ("best", 0),
        ("value", [1]),
        ("ok", None),
        ("schema_version", 0),
        ("surprise", 1),
    ],
)
def test_anything_else_is_not(name: str, value: object) -> None:
    body = {**document(Whole(**GIVEN)), name: value}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, SCHEMA)


@pytest.mark.parametrize("name", ["schema_version", "kind", "best", "ok"])
def test_nothing_may_be_left_out(name: str) -> None:
    body = dict(document(Whole(**GIVEN)))
    del body[name]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, SCHEMA)


def test_descriptions_are_the_docstrings() -> None:
    part = SCHEMA["$defs"]["Part"]
    assert part["description"] == "One part."
    assert part["properties"]["name"]["description"] == "Its full name."
    assert SCHEMA["properties"]["ok"]["description"] == "Whether all is well."


def test_what_no_report_holds_is_refused() -> None:
    with pytest.raises(TypeError, match="a schema cannot hold"):
        Definitions().of(bytes)
