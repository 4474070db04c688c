"""Which rule of a device map decides about a name, in a time that does not grow with the number of rules.

The patterns stand in a tree of their components. A name is looked up by walking down: one step a component,
and beside it the few branches whose range or glob matches. What was matched once is remembered.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

RANGE = re.compile(r"([0-9]{1,6})-([0-9]{1,6})\Z", re.ASCII)
_WILD = re.compile(r"[*?\[]")
_NUMBER = re.compile(r"[0-9]{1,6}\Z", re.ASCII)


def is_glob(component: str) -> bool:
    """True for a component with wildcards."""
    return _WILD.search(component) is not None


def is_plain(component: str) -> bool:
    """True for a component that stands for itself alone."""
    return component.isalpha() or (RANGE.match(component) is None and not is_glob(component))


def component_matches(pattern: str, component: str) -> bool:
    """Whether one component of a pattern covers one component of a name."""
    ends = RANGE.match(pattern)
    if ends:
        return _NUMBER.match(component) is not None and int(ends[1]) <= int(component) <= int(ends[2])
    if is_glob(pattern):
        return fnmatch.fnmatchcase(component, pattern)
    return pattern == component


@dataclass(slots=True)
class PatternTree:
    """Dotted patterns by their components; `add` them, then ask for those that cover a name."""

    _plain: dict[str, PatternTree] = field(default_factory=dict)
    _wild: dict[str, PatternTree] = field(default_factory=dict)
    _ends: list[int] = field(default_factory=list)
    _matched: dict[str, tuple[PatternTree, ...]] = field(default_factory=dict)

    def add(self, pattern: str, number: int) -> None:
        """Remember `pattern` by its `number`; "" covers everything."""
        node = self
        for part in pattern.split(".") if pattern else ():
            branches = node._plain if is_plain(part) else node._wild
            node = branches.setdefault(part, PatternTree())
        node._ends.append(number)

    def covering(self, name: str) -> Iterator[int]:
        """Numbers of the patterns that cover `name` or something above it."""
        level: list[PatternTree] = [self]
        yield from self._ends
        for part in name.split("."):
            level = [branch for node in level for branch in node._below(part)]
            if not level:
                return
            for node in level:
                yield from node._ends

    def _below(self, part: str) -> tuple[PatternTree, ...]:
        if not self._wild:
            branch = self._plain.get(part)
            return () if branch is None else (branch,)
        if part not in self._matched:
            plain = (self._plain[part],) if part in self._plain else ()
            wild = tuple(node for pattern, node in self._wild.items() if component_matches(pattern, part))
            self._matched[part] = plain + wild
        return self._matched[part]


class NameTree:
    """Dotted names by their components, to ask whether a pattern covers any of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._root: dict[str, dict[str, object]] = {}
        for name in names:
            node: dict[str, object] = self._root  # type: ignore[assignment]  # a tree of dictionaries
            for part in name.split("."):
                node = node.setdefault(part, {})  # type: ignore[assignment]

    def covered_by(self, pattern: str) -> bool:
        """True when a name is what `pattern` names, or lies below it."""
        level: list[dict[str, object]] = [self._root]  # type: ignore[list-item]
        for part in pattern.split(".") if pattern else ():
            if is_plain(part):
                level = [node[part] for node in level if part in node]  # type: ignore[misc]
            else:
                level = [
                    below  # type: ignore[misc]
                    for node in level
                    for name, below in node.items()
                    if component_matches(part, name)
                ]
        return bool(level)
