"""The pieces that a plan moves around, and placements made of them.

A *unit* is a decoder block, or a largest module outside of all blocks (`model.embed_tokens`, `model.norm`,
`lm_head`). Units stand in execution order. A unit becomes one entry of the placement, unless rules part it;
then its children do, as far down as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.names import parents
from gptq_cli.placement.placement import Placement, PlacementEntry

DeviceOf = Callable[[str], Device | None]
"""Tensor name -> device; None where nothing covers it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor name inside a unit; a tied name without a tensor of its own has size 0."""

    name: str
    size_bytes: int
    buffer: bool


@dataclass(frozen=True, slots=True)
class Unit:
    """A block, or a module outside of all blocks."""

    name: str
    parts: tuple[Part, ...]
    block: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of its own tensors; a tied one counts where its first name is."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def parameters(self) -> bool:
        """False: nothing but buffers."""
        return any(not part.buffer for part in self.parts)


def units_of(facts: ModelFacts) -> tuple[Unit, ...]:
    """Every unit of the model, in execution order where that is known."""
    blocks = frozenset(facts.blocks)
    above = {prefix for block in blocks for prefix in parents(block)}
    parts: dict[str, list[Part]] = {}
    named = [Part(t.name, t.size_bytes, t.buffer) for t in facts.tensors]
    known = {part.name for part in named}
    aliases = [Part(n, 0, False) for group in facts.tied for n in group if n not in known]
    for part in [*named, *aliases]:
        parts.setdefault(_unit_name(part.name, blocks, above), []).append(part)
    rank = {name: index for index, name in enumerate(facts.order)}
    names = sorted(parts, key=lambda name: rank.get(name, len(rank)))
    return tuple(Unit(name, tuple(parts[name]), name in blocks) for name in names)


def _unit_name(tensor: str, blocks: frozenset[str], above: set[str]) -> str:
    parts = tensor.split(".")
    for length in range(1, len(parts)):
        name = ".".join(parts[:length])
        if name in blocks or name not in above:
            return name
    return tensor


def place(
    facts: ModelFacts, device_of: DeviceOf, reason: str, main: Device | None = None
) -> Placement | None:
    """The placement in which each tensor lies where `device_of` says.

    Buffers that nothing covers go to the main device. None when a parameter is not covered.
    """
    units = units_of(facts)
    wanted = {part.name: device_of(part.name) for unit in units for part in unit.parts}
    if any(wanted[part.name] is None for unit in units for part in unit.parts if not part.buffer):
        return None
    if main is None:
        main = main_device(units, wanted)
    assigned = {name: device or main for name, device in wanted.items()}
    if len(set(assigned.values())) <= 1:
        only = next(iter(assigned.values()), main)
        return Placement((PlacementEntry("", only, facts.size_bytes, True),), only, reason)
    entries: list[PlacementEntry] = []
    for unit in units:
        entries += _entries(unit.name, unit.parts, assigned)
    return Placement(tuple(entries), main, reason)


def main_device(units: Iterable[Unit], wanted: dict[str, Device | None]) -> Device:
    """Where the first block on an accelerator is; else any accelerator; else what is there."""
    ordered = sorted(units, key=lambda unit: not unit.block)
    found = [device for unit in ordered for part in unit.parts if (device := wanted[part.name]) is not None]
    for device in found:
        if device.is_accelerator:
            return device
    return CPU


def _entries(name: str, parts: tuple[Part, ...], assigned: dict[str, Device]) -> list[PlacementEntry]:
    """One entry where all parts agree, else the entries of the children."""
    devices = {assigned[part.name] for part in parts}
    if len(devices) == 1:
        size = sum(part.size_bytes for part in parts)
        return [PlacementEntry(name, devices.pop(), size, any(not part.buffer for part in parts))]
    children: dict[str, list[Part]] = {}
    for part in parts:
        below = part.name[len(name) + 1 :].partition(".")[0]
        children.setdefault(f"{name}.{below}", []).append(part)
    return [entry for child, below in children.items() for entry in _entries(child, tuple(below), assigned)]


def together(facts: ModelFacts, units: Iterable[Unit]) -> dict[str, str]:
    """For each unit that is tied to an earlier one: the name of that one, whose device it must share."""
    owner = {part.name: unit.name for unit in units for part in unit.parts}
    follows: dict[str, str] = {}
    for group in facts.tied:
        names = list(dict.fromkeys(owner[name] for name in group if name in owner))
        for name in names[1:]:
            follows[name] = names[0]
    return follows
