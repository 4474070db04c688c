"""Where every tensor of a model lives, and the plain facts that such a plan is made from.

A `Placement` is a list of *entries*: disjoint dotted names, matched by whole components, that together cover
every parameter and buffer. One-device placements have the single entry "". Nothing here knows torch, so rules
can check a plan for hardware that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gptq_cli.errors import DeviceMapError
from gptq_cli.placement.device import Device
from gptq_cli.placement.device_map import MaxMemory


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """One device that is there (or that `--devices` pretends is there)."""

    device: Device
    total_bytes: int
    free_bytes: int


def parse_inventory(text: str, accelerator: str = "cuda") -> tuple[DeviceBudget, ...]:
    """Read `--devices "cuda:0=24GiB,cpu=64GiB"`: devices to plan for, all free. Raises `DeviceMapError`."""
    limits = MaxMemory.parse(text, accelerator, what="devices").limits
    return tuple(DeviceBudget(device, size, size) for device, size in limits)


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {entry.name: entry.device for entry in self.entries})

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

    @property
    def devices(self) -> tuple[Device, ...]:
        """The distinct devices, accelerators first, then cpu."""
        return tuple(sorted({entry.device for entry in self.entries}))

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Names of the cpu entries beside other devices, in model order; () for a plain CPU run."""
        if len(self.devices) < 2:
            return ()
        return tuple(entry.name for entry in self.entries if entry.device.kind == "cpu")

    @property
    def streams_blocks(self) -> bool:
        """True for a plain CPU run: quantizing then reads each block from the files when its turn comes."""
        return all(entry.device.kind == "cpu" for entry in self.entries)

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
