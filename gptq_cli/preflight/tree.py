"""A placement as a folded tree: equal neighbours become one row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.placement import Placement
from gptq_cli.planning.units import units_of
from gptq_cli.results.map import TreeRow


@dataclass(slots=True)
class _Node:
    """A module on the way from the root to the entries."""

    name: str
    path: str
    devices: dict[str, None] = field(default_factory=dict)
    size_bytes: int = 0
    parameters: bool = False
    children: dict[str, _Node] = field(default_factory=dict)

    def add(self, device: str, size_bytes: int, *, parameters: bool) -> None:
        self.devices.setdefault(device)
        self.size_bytes += size_bytes
        self.parameters |= parameters

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for siblings that fold into one row."""
        below = tuple((name, child.signature) for name, child in self.children.items())
        return tuple(self.devices), self.parameters, below


def placement_tree(placement: Placement, facts: ModelFacts) -> tuple[TreeRow, ...]:
    """The rows of the tree, parents before children; equal numbered siblings are one row."""
    root = _Node("", "")
    for name, device, size, parameters in _leaves(placement, facts):
        node = root
        node.add(device, size, parameters=parameters)
        walked: list[str] = []
        for part in name.split("."):
            walked.append(part)
            node = node.children.setdefault(part, _Node(part, ".".join(walked)))
            node.add(device, size, parameters=parameters)
    return tuple(_rows(root, 0))


def _leaves(placement: Placement, facts: ModelFacts) -> Iterable[tuple[str, str, int, bool]]:
    """(name, device, bytes, parameters): the entries, or the model's units where one entry covers all."""
    if len(placement.entries) == 1 and not placement.entries[0].name:
        device = str(placement.entries[0].device)
        return [(unit.name, device, unit.size_bytes, unit.parameters) for unit in units_of(facts)]
    return [(e.name, str(e.device), e.size_bytes, e.parameters) for e in placement.entries]


def _rows(node: _Node, depth: int) -> Iterable[TreeRow]:
    children = list(node.children.values())
    start = 0
    while start < len(children):
        end = start + 1
        while end < len(children) and _folds(children[end - 1], children[end], children[start]):
            end += 1
        run = children[start:end]
        yield _row(run, depth)
        yield from _rows(run[0], depth + 1) if len(run) == 1 else ()
        start = end


def _folds(before: _Node, node: _Node, first: _Node) -> bool:
    numbers = before.name.isdigit() and node.name.isdigit() and int(node.name) == int(before.name) + 1
    return numbers and node.signature == first.signature


def _row(run: list[_Node], depth: int) -> TreeRow:
    first = run[0]
    name = first.name if len(run) == 1 else f"{first.name}-{run[-1].name}"
    above = first.path.rpartition(".")[0]
    return TreeRow(
        name=name,
        path=f"{above}.{name}" if above else name,
        depth=depth,
        devices=tuple(first.devices),
        size_bytes=sum(node.size_bytes for node in run),
        modules=len(run),
        parameters=first.parameters,
        leaf=len(run) > 1 or not first.children,
    )
