"""`dynamic` read back, of any tool: which linears are dense, and what differs for others.

GPTQModel, vLLM and SGLang try the patterns in their order with `re.match`, and the first that matches wins.
So does this module, on the names of the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptq_cli.errors import CheckpointError

_PATTERN_LIMIT = 1000
_SHOWN = 80
"""Characters of a pattern in a message."""
_NESTED_REPEATS = re.compile(r"[+*}]\??\)+[+*{]")
"""A repeat inside a repeated group, `(a+)+`: matching such a pattern can take practically for ever."""
_EXACT = re.compile(r"\^?((?:\w|\\\.)+)\$")
"""The name of one linear, spelled out; GPTQModel can write one for each."""
Fields = Mapping[str, Any]
"""What a key of `dynamic` changes: "bits" -> 8."""


@dataclass(frozen=True, slots=True)
class DynamicRules:
    """`dynamic` of any tool, as GPTQModel reads it: in order, `re.match`, the first match wins."""

    patterns: tuple[tuple[re.Pattern[str], Fields | None], ...] = ()
    """What it changes; None: "left dense"."""
    _exact: Mapping[str, int] = field(default_factory=dict)
    """Names that patterns spell out -> which pattern; so that thousands of these cost nothing."""
    _others: tuple[int, ...] = ()
    _keys: tuple[str, ...] = field(default=(), compare=False)
    _where: str = field(default="", compare=False)

    def of(self, module: str) -> tuple[bool, Fields]:
        """(left dense, changed fields) of one linear."""
        first = self._first(module)
        fields = self.patterns[first][1] if first < len(self.patterns) else {}
        return fields is None, fields or {}

    def place(self, module: str) -> str:
        """The key that decides about a linear, and its file: `quantize_config.json: dynamic['+:.*up_proj']`;
        "" without one."""
        first = self._first(module)
        return f"{self._where}: {_entry(self._keys[first])}" if first < len(self._keys) else ""

    def _first(self, module: str) -> int:
        """The number of the first pattern that matches; that of all of them where none does."""
        first = self._exact.get(module, len(self.patterns))
        for number in self._others:
            if number > first:
                break
            if self.patterns[number][0].match(module):
                return number
        return first


def parse_dynamic(dynamic: object, where: str) -> DynamicRules:
    """Read `dynamic` of the file `where`: "-:regex" leaves dense, "+:regex" or "regex" changes fields.

    Raises `CheckpointError` for what is no pattern, or one that could take for ever.
    """
    if dynamic is None:
        return DynamicRules()
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"{where}: dynamic is not a JSON object")
    result: list[tuple[re.Pattern[str], Fields | None]] = []
    exact: dict[str, int] = {}
    others: list[int] = []
    for number, (key, fields) in enumerate(dynamic.items()):
        text = key[2:] if key[:2] in ("-:", "+:") else key
        pattern = _compiled(text, where)
        spelled = _EXACT.fullmatch(text)
        if spelled is not None:
            exact.setdefault(spelled[1].replace(r"\.", "."), number)
        else:
            others.append(number)
        if key.startswith("-:"):
            result.append((pattern, None))
            continue
        if not isinstance(fields, Mapping):
            raise CheckpointError(f"{where}: {_entry(key)} is not a JSON object")
        known = ("bits", "group_size", "sym", "desc_act")
        result.append((pattern, {name: fields[name] for name in known if fields.get(name) is not None}))
    return DynamicRules(tuple(result), exact, tuple(others), tuple(dynamic), where)


def _entry(key: str) -> str:
    shown = key if len(key) <= _SHOWN else f"{key[:_SHOWN]}…"
    return f"dynamic[{shown!r}]"


def _compiled(text: str, where: str) -> re.Pattern[str]:
    try:
        if len(text) > _PATTERN_LIMIT:
            raise re.error("it is too long")
        if _NESTED_REPEATS.search(text):
            raise re.error("it repeats a group that repeats")
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(f"{where}: dynamic has the pattern {text[:_SHOWN]!r}: {error}") from error
