"""`document` run backwards: report.json, and what `--json` printed, as the report that it was made of.

The types of the dataclasses say how each field is read, so a field that is new there is read as well. What an
older version did not write has its default; what a newer one wrote besides is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gptq_cli.fields import INT64
from gptq_cli.placement.device import Device
from gptq_cli.results.document import SCHEMA_VERSION, Json
from gptq_cli.wording import number_of

T = TypeVar("T")
_SHOWN = 40
_MOST = 1e300
"""The largest magnitude of a number: a hundred times it is still finite."""


def read_document(kind: type[T], held: Json) -> T:
    """The report of type `kind` whose document is `held`.

    Raises `ValueError` with the place, the value and what was expected there.
    """
    if not isinstance(held, dict):
        raise ValueError(_wrong("the document", held, "an object"))
    version = held.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {_shown(version)}; this version reads {SCHEMA_VERSION}")
    return _read(kind, held, "")  # type: ignore[no-any-return]


def _read(kind: Any, held: Any, where: str) -> Any:
    if get_origin(kind) in (Union, UnionType):
        return _one_of(get_args(kind), held, where)
    if get_origin(kind) is Literal:
        if held not in get_args(kind):
            raise ValueError(_wrong(where, held, ", ".join(map(str, get_args(kind)))))
        return held
    if get_origin(kind) is tuple:
        return _sequence(get_args(kind), held, where)
    if kind is float and held is None:
        return math.nan  # a number that JSON does not know
    if kind in (int, float) and not isinstance(held, bool) and isinstance(held, int | float):
        _check_size(held, where)
        if kind is float:
            return float(held)
    if kind is Device:
        return Device.parse(_checked(str, held, where))
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, _checked(dict, held, where), where)
    return _checked(NoneType if kind is None else kind, held, where)


def _one_of(kinds: tuple[Any, ...], held: Any, where: str) -> Any:
    """As the first alternative that fits; a whole number stays one where that is allowed."""
    inside: ValueError | None = None
    for kind in sorted(kinds, key=lambda kind: kind is float):
        if kind is float and held is None:
            continue
        try:
            return _read(kind, held, where)
        except ValueError as error:
            if isinstance(held, dict) and is_dataclass(kind):
                inside = error  # it says more than that no alternative fits
    raise inside or ValueError(_wrong(where, held, " or ".join(map(_name, kinds))))


def _sequence(kinds: tuple[Any, ...], held: Any, where: str) -> tuple[Any, ...]:
    if isinstance(held, dict):  # (name, value) pairs are written as an object
        held = list(map(list, held.items()))
    items = _checked(list, held, where)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_read(kinds[0], item, f"{where}[{number}]") for number, item in enumerate(items))
    if len(items) != len(kinds):
        raise ValueError(_wrong(where, held, number_of(len(kinds), "value")))
    return tuple(_read(kind, item, where) for kind, item in zip(kinds, items, strict=True))


def _dataclass(kind: type, held: Mapping[str, Any], where: str) -> Any:
    given = {}
    types = _types(kind)
    for item in fields(kind):
        place = f"{where}.{item.name}" if where else item.name
        if item.name in held:
            given[item.name] = _read(types[item.name], held[item.name], place)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{place} is missing")
    return kind(**given)


@cache
def _types(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _checked(kind: type, held: Any, where: str) -> Any:
    if not isinstance(held, kind) or (isinstance(held, bool) and kind is not bool):
        raise ValueError(_wrong(where, held, _name(kind)))
    return held


def _check_size(held: float, where: str) -> None:
    """Raise `ValueError` for a number that no report holds: what is made of it might not be finite."""
    if isinstance(held, int) and abs(held) > INT64:
        raise ValueError(_wrong(where, held, f"at most {INT64}"))
    if not abs(held) <= _MOST:
        raise ValueError(_wrong(where, held, "a finite number, or null for none"))


def _name(kind: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    names |= {NoneType: "null", dict: "an object", list: "a list"}
    return names.get(kind, "an object" if is_dataclass(kind) else "a list")


def _wrong(where: str, held: object, expected: str) -> str:
    return f"{where} is {_shown(held)}; expected: {expected}"


def _shown(held: object) -> str:
    text = repr(held)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
