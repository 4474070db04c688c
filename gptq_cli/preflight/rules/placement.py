"""Rules about a finished placement: what lies where it cannot work, or works worse than it looks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from gptq_cli.placement.device import CPU, Device, format_size
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.names import owner, parents
from gptq_cli.placement.placement import PlacementEntry
from gptq_cli.planning.cases import PlacedCase
from gptq_cli.planning.repair import in_runs
from gptq_cli.preflight.rules.device_map import instead
from gptq_cli.rules import Remark, rule
from gptq_cli.wording import names_text, number_of


@rule("error")
def block_split(placed: PlacedCase) -> list[Remark]:
    """Parts of one decoder block lie on different devices.

    A block is quantized as a whole: its residual connections add tensors of both ends, and its calibration
    inputs are on one device. accelerate would move activations back and forth inside every forward.
    """
    found = []
    entries, offer = placed.placement.entries, ""
    for block in placed.case.facts.blocks:
        parts = [entry for entry in entries if entry.name.startswith(block + ".")]
        devices = sorted({entry.device for entry in parts})
        if len(devices) < 2:
            continue
        best = max(devices, key=lambda device: _bytes_on(parts, device))
        fewer = [entry.name for entry in parts if entry.device != best]
        offer = offer or instead(placed.case)
        found.append(
            Remark(
                subject=block,
                message=f"the block is split over {' and '.join(map(str, devices))}; it works on one device",
                hint=f"{offer} (all of {block} on {best})",
                modules=tuple(fewer),
                size_bytes=sum(entry.size_bytes for entry in parts if entry.device != best),
            )
        )
    return found


def _bytes_on(parts: list[PlacementEntry], device: Device) -> int:
    return sum(entry.size_bytes for entry in parts if entry.device == device)


@rule("error")
def tied_split(placed: PlacedCase) -> list[Remark]:
    """Tensors that are one (tied weights) are sent to different devices.

    One tensor cannot lie on two devices: accelerate makes a copy, which costs the memory twice and breaks the
    tie.
    """
    shared: dict[tuple[tuple[str, ...], tuple[Device, ...]], list[tuple[str, ...]]] = {}
    for group in placed.case.facts.tied:
        devices = tuple(placed.placement.device_of(name) for name in group)
        if len(set(devices)) > 1:
            shared.setdefault((_tops(group), devices), []).append(group)
    found = []
    for (tops, devices), groups in shared.items():
        modules = tops if len(groups) > 1 else tuple(owner(name) for name in groups[0])
        what = f"{len(groups)} tensors" if len(groups) > 1 else "one tensor"
        said = " and ".join(f"{module} on {device}" for module, device in zip(modules, devices, strict=True))
        found.append(
            Remark(
                subject=modules[-1],
                message=f"{' and '.join(modules)} share {what}, but the device map has {said}",
                hint=f"{instead(placed.case)} (all of them on {devices[0]})",
                modules=modules,
            )
        )
    return found


def _tops(group: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that names of one tensor differ in: without the components that all of them end in."""
    parts = [name.split(".") for name in group]
    same = 0
    while len({tuple(part[-same - 1 :]) for part in parts}) == 1:
        same += 1
    return tuple(".".join(part[: len(part) - max(1, same)]) for part in parts)


@rule("warning")
def block_order(placed: PlacedCase) -> list[Remark]:
    """Blocks change devices more often than they must, so hidden states travel back and forth.

    A plan of our own changes devices as seldom as it can, and so does a map whose blocks share weights with
    others far away: those lie together.
    """
    made = block_runs(placed)
    if made is None:
        return []
    devices = _block_devices(placed)
    moved = _moved(devices, made)
    changes, fewer = _changes(devices), _changes(moved)
    offered = f'"{made}"' in placed.in_runs and _one_run_each(moved)
    remark = " (each device has one run of blocks)" if offered else ""
    return [
        Remark(
            subject="device map",
            message=f"blocks change devices {len(changes)} times; {len(fewer)} would do",
            hint=f"{placed.in_runs}{remark}",
            modules=tuple(changes),
        )
    ]


def block_runs(placed: PlacedCase) -> DeviceMap | None:
    """The map with one run of blocks for each device, or as near to it as ties allow, where its blocks change
    devices less often."""
    case, made, devices = placed.case, None, _block_devices(placed)
    while case.spec.strategy is None and not _one_run_each(devices):
        tried = in_runs(case, devices)
        moved = _moved(devices, tried)
        if len(_changes(moved)) >= len(_changes(devices)):
            break
        # once more: devices that are not there became others, and ties moved blocks
        case, made, devices = replace(case, spec=tried), tried, moved
    return made


def _one_run_each(devices: dict[str, Device]) -> bool:
    return len(_changes(devices)) < max(1, len(set(devices.values())))


def _block_devices(placed: PlacedCase) -> dict[str, Device]:
    """The device of every block that is not split."""
    split = {block for entry in placed.placement.entries for block in parents(entry.name)}
    blocks = (block for block in placed.case.facts.blocks if block not in split)
    return {block: placed.placement.device_of(block) for block in blocks}


def _moved(devices: dict[str, Device], made: DeviceMap) -> dict[str, Device]:
    """Where the map `made` has the same blocks."""
    found = {block: made.rule_for(block) for block in devices}
    return {block: rule.device for block, rule in found.items() if rule is not None}


def _changes(devices: dict[str, Device]) -> list[str]:
    """Blocks that lie on another device than the one before."""
    return [block for (_, before), (block, device) in pairwise(devices.items()) if before != device]


@rule("warning")
def cpu_offload(placed: PlacedCase) -> list[Remark]:
    """Modules lie on cpu while others lie on an accelerator.

    They still execute on the accelerator: their dispatch hooks are removed and replaced by a chain of
    cpu-offload hooks, each of which brings its module in and sends the one before it back to main memory. It
    costs one transfer per forward, and main memory for the weights.
    """
    names = placed.placement.offloaded
    if not names or placed.placement.main_device == CPU:
        return []
    one = len(names) == 1
    size = sum(entry.size_bytes for entry in placed.placement.entries if entry.name in set(names))
    hooked, skipped = placed.offload, placed.offload_skipped
    chain = f"hook chain in execution order: {names_text(hooked)}" if hooked else "nothing to hook"
    without = f"; no hook for {names_text(skipped)} (no parameters)" if skipped else ""
    return [
        Remark(
            subject="device map",
            message=(
                f"CPU offload is not recommended: {number_of(len(names), 'module')} ({format_size(size)}) "
                f"{'lies' if one else 'lie'} on cpu and {'executes' if one else 'execute'} on "
                f"{placed.placement.main_device}; {chain}{without}"
            ),
            hint=placed.without_offload or "an accelerator with more memory would do without",
            modules=names,
            size_bytes=size,
        )
    ]


@rule("note")
def cpu_only(placed: PlacedCase) -> list[Remark]:
    """Everything lies on cpu: a plain CPU run, without hooks and without a warning about offload."""
    if placed.placement.devices != (CPU,):
        return []
    unused = placed.case.accelerators
    if not unused:
        return []
    return [
        Remark(
            subject="device map",
            message=f"everything runs on cpu, without offload hooks; {unused[0]} stays unused",
            hint=placed.on_accelerators,
        )
    ]


@rule("note")
def uncovered_buffers(placed: PlacedCase) -> list[Remark]:
    """Modules without parameters that no rule covers (`model.rotary_emb`) go to the main device."""
    spec: DeviceMap = placed.case.spec
    if spec.strategy is not None:
        return []
    uncovered = [t for t in placed.case.facts.tensors if t.buffer and spec.rule_for(t.name) is None]
    if not uncovered:
        return []
    owners = tuple(dict.fromkeys(owner(t.name) for t in uncovered))
    return [
        Remark(
            subject=names_text(owners),
            message=f"not in the device map, without parameters: goes to {placed.placement.main_device}",
            modules=owners,
            size_bytes=sum(t.size_bytes for t in uncovered),
        )
    ]
