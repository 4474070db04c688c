"""Rules about a finished placement: what lies where it cannot work, or works worse than it looks."""

from __future__ import annotations

from itertools import pairwise

from gptq_cli.placement.device import CPU, Device, format_size
from gptq_cli.placement.device_map import DeviceMap, DeviceRule
from gptq_cli.placement.names import owner
from gptq_cli.placement.placement import PlacementEntry
from gptq_cli.planning.cases import PlacedCase
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
    found = []
    for group in placed.case.facts.tied:
        devices = {name: placed.placement.device_of(name) for name in group}
        if len(set(devices.values())) < 2:
            continue
        first = devices[group[0]]
        owners = [owner(name) for name in group]
        said = " and ".join(
            f"{module} on {devices[name]}" for module, name in zip(owners, group, strict=True)
        )
        found.append(
            Remark(
                subject=owners[-1],
                message=f"{' and '.join(owners)} share one tensor, but the device map has {said}",
                hint=f"{instead(placed.case)} (all of them on {first})",
                modules=tuple(owners),
            )
        )
    return found


@rule("warning")
def block_order(placed: PlacedCase) -> list[Remark]:
    """Blocks change devices more often than they have devices, so hidden states travel back and forth."""
    assigned = [
        (block, placed.placement.device_of(block))
        for block in placed.case.facts.blocks
        if _whole(placed, block)
    ]
    changes = [b for (_, a), (b, c) in pairwise(assigned) if a != c]
    needed = len({device for _, device in assigned}) - 1
    if len(changes) <= max(0, needed):
        return []
    return [
        Remark(
            subject="device map",
            message=f"blocks change devices {len(changes)} times; {needed} would do",
            hint=f'--device-map "{_contiguous(placed, assigned)}" (each device has one run of blocks)',
            modules=tuple(changes),
        )
    ]


def _whole(placed: PlacedCase, block: str) -> bool:
    return not any(entry.name.startswith(block + ".") for entry in placed.placement.entries)


def _contiguous(placed: PlacedCase, assigned: list[tuple[str, Device]]) -> DeviceMap:
    """The same number of blocks per device, each device one run; rules for what is not a block stay."""
    prefix = assigned[0][0].rpartition(".")[0]
    rules, start = [], 0
    for device in dict.fromkeys(device for _, device in assigned):
        count = sum(1 for _, other in assigned if other == device)
        end = start + count - 1
        rules.append(DeviceRule(f"{prefix}.{start}-{end}" if count > 1 else f"{prefix}.{start}", device))
        start = end + 1
    blocks = tuple(f"{block}." for block in placed.case.facts.blocks)
    outside = [t.name for t in placed.case.facts.tensors if not t.name.startswith(blocks)]
    kept = [r for r in placed.case.spec.rules if r.pattern and any(map(r.covers, outside))]
    rest = next((r for r in placed.case.spec.rules if not r.pattern), DeviceRule("", assigned[0][1]))
    return DeviceMap(rules=(*rules, *kept, rest))


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
