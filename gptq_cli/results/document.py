"""Reports as JSON documents: report.json, and what `--json` prints."""

from __future__ import annotations

import math
import re
from dataclasses import fields, is_dataclass

Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


SCHEMA_VERSION = 1
"""Of every document that `document` makes; raised when a field changes its meaning or goes away."""


_PAIRS = re.compile(r"tuple\[tuple\[str, (?!\.\.\.)[^,\]]+\], \.\.\.\]")


def to_json(value: object) -> Json:
    """`value` as JSON holds it.

    A dataclass becomes an object of its public fields and of the properties that its `json_properties`
    names, unless it has a text form of its own (`Device`, `DeviceMap`): then that text. A field of
    (name, value) pairs becomes an object too. NaN and the infinities, which JSON does not know, become
    null. Raises `TypeError` for a type that no report holds.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        if type(value).__str__ is not object.__str__:
            return str(value)
        document: dict[str, Json] = {}
        for item in fields(value):
            if item.name.startswith("_"):
                continue
            held = getattr(value, item.name)
            pairs = isinstance(item.type, str) and _PAIRS.fullmatch(item.type) is not None
            document[item.name] = to_json(dict(held) if pairs else held)
        for name in getattr(value, "json_properties", ()):
            document[name] = to_json(getattr(value, name))
        return document
    raise TypeError(f"a report cannot hold {type(value).__name__}")


def document(report: object) -> dict[str, Json]:
    """The JSON document of a report: its fields after `schema_version`. This is report.json, and `--json`."""
    body = to_json(report)
    if not isinstance(body, dict):
        raise TypeError(f"a document is made of a report, not of {type(report).__name__}")
    return {"schema_version": SCHEMA_VERSION, **body}
