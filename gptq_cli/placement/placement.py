"""Where every tensor of a model lives, and the plain facts that such a plan is made from.

A `Placement` is a list of *entries*: disjoint dotted names, matched by whole components, that together cover
every parameter and buffer. One-device placements have the single entry "". Nothing here knows torch, so rules
can check a plan for hardware that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gptq_cli.errors import DeviceMapError
from gptq_cli.placement.cards import CARDS
from gptq_cli.placement.device import CPU, Device, syntax_error
from gptq_cli.placement.device_map import MaxMemory


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """One device that is there (or that `--devices` pretends is there)."""

    device: Device
    total_bytes: int
    free_bytes: int
    card: str = ""
    """The name of a card in `CARDS`, where it was given."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where one of several processes works, and what it can count on there."""

    rank: int
    host: str
    processes: int
    """On its machine, itself among them."""
    budgets: tuple[DeviceBudget, ...]
    """Its accelerator, where it has one, and its share of the machine's main memory."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def device(self) -> Device:
        """On which it works."""
        return self.budgets[0].device


def least_of(places: Sequence[RankPlace], own: int = 0) -> tuple[DeviceBudget, ...]:
    """What every one of them can count on, on the devices of number `own`: all ranks work by one plan."""
    return tuple(
        replace(
            budget,
            total_bytes=min(place.budgets[at].total_bytes for place in places),
            free_bytes=min(place.budgets[at].free_bytes for place in places),
        )
        for at, budget in enumerate(places[own].budgets)
    )


def places_for(processes: int, budgets: Sequence[DeviceBudget], host: str = "") -> tuple[RankPlace, ...]:
    """So many processes on machines that each have the devices of `budgets`: one for each accelerator of a
    machine, and of several machines no more than are needed; all on one machine where it has none.

    `host`: what the machine is called; "": it is one that is planned.
    """
    accelerators = [budget for budget in budgets if budget.device.is_accelerator]
    main = [budget for budget in budgets if budget.device == CPU]
    on_each = min(processes, len(accelerators)) or processes
    machines = -(-processes // on_each)

    def place(rank: int) -> RankPlace:
        machine, local = divmod(rank, on_each)
        there = min(on_each, processes - machine * on_each)
        share = [
            replace(one, total_bytes=one.total_bytes // there, free_bytes=one.free_bytes // there)
            for one in main
        ]
        name = host if host and machine == 0 else f"machine {machine + 1}" if machines > 1 else "the machine"
        return RankPlace(rank, name, there, (*accelerators[local : local + 1], *share))

    return tuple(place(rank) for rank in range(processes))


def parse_inventory(text: str) -> tuple[DeviceBudget, ...]:
    """Read `--devices "cuda:0=24GiB@4090,cpu=64GiB"`: devices to plan for, all free, and what card each is.
    Raises `DeviceMapError`."""
    sizes = _CARD.sub(lambda found: " " * len(found[0]), text)
    limits = MaxMemory.parse(sizes, what="devices").limits
    cards = [_card(text, part) for part in _parts(text)]
    return tuple(
        DeviceBudget(device, size, size, card) for (device, size), card in zip(limits, cards, strict=True)
    )


_CARD = re.compile("@[^,]*")


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """Where each entry begins, and the entry."""
    at = 0
    for part in text.split(","):
        yield at, part
        at += len(part) + 1


def _card(text: str, part: tuple[int, str]) -> str:
    at, entry = part
    found = _CARD.search(entry)
    name = found[0][1:].strip().lower() if found else ""
    if found is not None and entry.strip().lower().startswith("cpu"):
        message = f"{found[0][:60]!r} names a card, but the cpu is not one; allowed: cpu=SIZE"
        raise syntax_error("devices", text, at + found.start(), message, hint="leave it out")
    if found is None or name in CARDS:
        return name
    known = ", ".join(CARDS)
    message = f"{found[0][:60]!r} is not a card whose rates are known; allowed after '@': {known}"
    raise syntax_error(
        "devices", text, at + found.start(), message, hint="leave it out: no time is estimated"
    )


@dataclass(frozen=True, slots=True)
class PlacementEntry:
    """The module or tensor `name`, and everything below it, lives on `device`."""

    name: str
    device: Device
    size_bytes: int
    parameters: bool
    """False: nothing but buffers, or nothing at all. accelerate's offload hooks die on such a module."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The resolved map. `reason` says in one sentence who decided, and why."""

    entries: tuple[PlacementEntry, ...]
    main_device: Device
    """Where offloaded modules execute and where the model's inputs go."""
    reason: str
    _by_name: dict[str, Device] = field(init=False, repr=False, compare=False)
    devices: tuple[Device, ...] = field(init=False, repr=False, compare=False)
    """The distinct devices, accelerators first, then cpu."""
    offloaded: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Names of the cpu entries beside other devices, in model order; () for a plain CPU run."""

    def __post_init__(self) -> None:
        devices = tuple(sorted({entry.device for entry in self.entries}))
        on_cpu = (entry.name for entry in self.entries if entry.device.kind == "cpu")
        object.__setattr__(self, "_by_name", {entry.name: entry.device for entry in self.entries})
        object.__setattr__(self, "devices", devices)
        object.__setattr__(self, "offloaded", tuple(on_cpu) if len(devices) > 1 else ())

    def device_of(self, name: str) -> Device:
        """The device of a module or tensor.

        A module above several entries has a device only if they agree; otherwise `DeviceMapError` is raised.
        """
        probe = name
        while True:
            if probe in self._by_name:
                return self._by_name[probe]
            if not probe:
                break
            probe = probe.rpartition(".")[0]
        below = {
            e.device for e in self.entries if not name or e.name.startswith(name + ".") or e.name == name
        }
        if len(below) == 1:
            return below.pop()
        where = "lies on several devices" if below else "is not in the placement"
        raise DeviceMapError(
            f"{name!r} {where}: {', '.join(str(d) for d in sorted(below)) or 'no entry covers it'}"
        )

    def streams(self, block: str) -> bool:
        """Whether quantizing reads this block from the files when its turn comes: every block but those that
        rest on the cpu beside accelerators."""
        names = self.offloaded
        return not any(e == block or block.startswith(f"{e}.") or e.startswith(f"{block}.") for e in names)

    @property
    def size_bytes(self) -> tuple[tuple[Device, int], ...]:
        """(device, bytes of the weights and buffers on it)."""
        totals = dict.fromkeys(self.devices, 0)
        for entry in self.entries:
            totals[entry.device] += entry.size_bytes
        return tuple(totals.items())

    def accelerate_map(self) -> dict[str, int | str]:
        """The map in the spelling that accelerate and transformers treat alike: ints for indexes."""
        return {entry.name: entry.device.for_accelerate for entry in self.entries}
