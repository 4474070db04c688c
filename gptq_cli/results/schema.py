"""The JSON Schema of a document, made from the dataclass that `to_json` writes it from.

    dataclass with a text form   string                        int, bool, str      integer, boolean, string
    any other dataclass          object, nothing else in it    Literal             enum
    tuple of (name, value)       object, any name              tuple[X, ...]       array
    X | None                     X or null                     float               number, or null: not finite

Descriptions are the docstrings of the classes, of their fields and of their properties, so that there is one
place to write them. `display.schemas` lists the documents.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gptq_cli.results.document import SCHEMA_VERSION

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]
_PLAIN: dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": ["number", "null"]},
    str: {"type": "string"},
    NoneType: {"type": "null"},
}


class Definitions:
    """The objects that a schema refers to, by the names of their classes; `of` adds what it meets."""

    def __init__(self) -> None:
        self.found: dict[str, Schema] = {}

    def of(self, kind: Any) -> Schema:
        """The schema of a value of the type `kind`. Raises `TypeError` for a type that no report holds."""
        if kind in _PLAIN:
            return dict(_PLAIN[kind])
        origin, parts = get_origin(kind), get_args(kind)
        if origin is Literal:
            return {"enum": list(parts)}
        if origin in (Union, UnionType):
            return _any_of([self.of(part) for part in parts])
        if origin is tuple:
            return self._of_tuple(parts)
        if isinstance(kind, type) and is_dataclass(kind):
            if kind.__str__ is not object.__str__:
                return {"type": "string"}
            if kind.__name__ not in self.found:
                self.found[kind.__name__] = {}  # a class may hold itself
                self.found[kind.__name__] = self.object_of(kind)
            return {"$ref": f"#/$defs/{kind.__name__}"}
        raise TypeError(f"a schema cannot hold {kind!r}")

    def object_of(self, kind: type, before: Schema | None = None) -> Schema:
        """The schema of an object made of the dataclass `kind`; `before`: properties in front of its own."""
        hints, said = get_type_hints(kind), _docstrings(kind)
        properties = dict(before or {})
        for item in fields(kind):
            if not item.name.startswith("_"):
                properties[item.name] = _described(self.of(hints[item.name]), said.get(item.name))
        for name in getattr(kind, "json_properties", ()):
            made = getattr(kind, name)
            properties[name] = _described(self.of(get_type_hints(made.fget)["return"]), made.__doc__)
        return _described(
            {
                "type": "object",
                "additionalProperties": False,
                "required": list(properties),
                "properties": properties,
            },
            kind.__doc__,
        )

    def _of_tuple(self, parts: tuple[Any, ...]) -> Schema:
        if parts[-1] is not Ellipsis:
            one_each = [self.of(part) for part in parts]
            return {"type": "array", "prefixItems": one_each, "items": False, "minItems": len(parts)}
        pair = get_args(parts[0]) if get_origin(parts[0]) is tuple else ()
        if len(pair) == 2 and pair[0] is str and pair[1] is not Ellipsis:
            return {"type": "object", "additionalProperties": self.of(pair[1])}
        return {"type": "array", "items": self.of(parts[0])}


def schema_of(kind: type, title: str, description: str) -> Schema:
    """The schema of the document that `document` makes of a report of the class `kind`."""
    known = Definitions()
    body = known.object_of(kind, {"schema_version": {"const": SCHEMA_VERSION}})
    return complete(title, description, body, known)


def complete(title: str, description: str, body: Schema, known: Definitions) -> Schema:
    """`body` as a schema of its own, with the definitions that it refers to."""
    head = {"$schema": DIALECT, "title": title, "description": description}
    rest = {name: part for name, part in body.items() if name != "description"}
    return {**head, **rest, "$defs": dict(sorted(known.found.items()))}


def _any_of(choices: list[Schema]) -> Schema:
    """One of several; plain types are put together, and null stands last."""
    others = [one for one in choices if set(one) != {"type"}]
    named = [one["type"] for one in choices if set(one) == {"type"}]
    types = {name: None for names in named for name in ([names] if isinstance(names, str) else names)}
    plain = [name for name in types if name != "null"] + ["null"] * ("null" in types)
    merged: list[Schema] = [{"type": plain[0] if len(plain) == 1 else plain}] if plain else []
    return {"anyOf": [*others, *merged]} if others else merged[0]


def _described(schema: Schema, text: str | None) -> Schema:
    """The schema with the first paragraph of a docstring as its description."""
    words = " ".join(inspect.cleandoc(text).split("\n\n")[0].split()) if text else ""
    return {"description": words, **schema} if words else schema


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """The texts below the fields of a class, by the names of the fields, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        tree = ast.parse(inspect.cleandoc(inspect.getsource(base)))
        definition = tree.body[0]
        if not isinstance(definition, ast.ClassDef):
            continue
        for item, after in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[item.target.id] = after.value.value
    return found
