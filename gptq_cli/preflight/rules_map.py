"""Rules about what a device map says, before anything is placed: names, devices, limits, the environment."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left
from collections.abc import Iterable

from gptq_cli.device import CPU, Device, format_size
from gptq_cli.device_map import DeviceMap, DeviceRule
from gptq_cli.device_rules import NameTree
from gptq_cli.findings import Finding
from gptq_cli.preflight.cases import MapCase

_SHOWN = 6
_FINDINGS = 20
"""Findings of one rule about single entries of a map; what is beyond stands in one more."""
_GUESSED = 3
_MAP_CHARACTERS = 4_000


def names_text(names: Iterable[str]) -> str:
    """`a, b, c and 12 more`."""
    listed = list(names)
    text = ", ".join(listed[:_SHOWN])
    return f"{text} and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else text


def meta_device(case: MapCase) -> list[Finding]:
    """The device map sends something to `meta`.

    `meta` is torch's device for tensors without data. Transformers accepts it as a device map and loads
    nothing there; quantizing such a module fails much later. It is refused here.
    """
    patterns = [rule.pattern for rule in case.spec.rules if rule.device.kind == "meta"]
    if not patterns:
        return []
    return [
        Finding(
            rule="meta-device",
            level="error",
            subject=_patterns_text(patterns),
            message="'meta' holds no data, so nothing can be quantized there; allowed: an accelerator or cpu",
            hint=_map_text(_replaced(case.spec, "meta", CPU), "write cpu in the place of meta"),
            modules=tuple(patterns),
        )
    ]


def _map_text(spec: DeviceMap, otherwise: str) -> str:
    """The map as an option to paste, or what to change where it is too long for that."""
    text = f'--device-map "{spec}"'
    return text if len(text) <= _MAP_CHARACTERS else f"in the device map, {otherwise}"


def _bounded(found: list[Finding]) -> list[Finding]:
    """The first findings, and one for the rest: a map may have 100,000 entries that are all wrong."""
    rest = found[_FINDINGS:]
    if len(rest) < 2:
        return found
    more = Finding(
        rule=rest[0].rule,
        level=rest[0].level,
        subject=names_text(finding.subject for finding in rest),
        message=f"the same of {len(rest)} more entries of the device map",
        hint="repair the first ones, then look again",
        modules=tuple(name for finding in rest[:_FINDINGS] for name in finding.modules[:_FINDINGS]),
    )
    return [*found[:_FINDINGS], more]


def device_absent(case: MapCase) -> list[Finding]:
    """The device map or --max-memory names a device that this machine (or --devices) does not have.

    Transformers does not check indexes; the first transfer to the device dies, after the weights were read.
    """
    there = [budget.device for budget in case.budgets]
    listed = ", ".join(str(device) for device in there)
    where = "in --devices" if case.given else "on this machine"
    found: list[Finding] = []
    patterns_on: dict[Device, list[str]] = {}
    for rule in case.spec.rules:
        patterns_on.setdefault(rule.device, []).append(rule.pattern)
    absent = [d for d in case.spec.devices if d.kind not in ("disk", "meta") and d not in there]
    for device in absent:
        patterns = patterns_on[device]
        closest = _closest_device(device, there)
        found.append(
            Finding(
                rule="device-absent",
                level="error",
                subject=str(device),
                message=f"{device} is not {where}; there: {listed}",
                hint=_map_text(
                    _replaced(case.spec, device, closest), f"write {closest} in the place of {device}"
                )
                if len(found) < _FINDINGS
                else "",
                modules=tuple(patterns),
            )
        )
    for device, _ in case.max_memory.limits if case.max_memory else ():
        if device not in there:
            found.append(
                Finding(
                    rule="device-absent",
                    level="error",
                    subject="--max-memory",
                    message=f"--max-memory names {device}, which is not there; there: {listed}",
                    hint=f"take {device} out of --max-memory",
                )
            )
    return _bounded(found)


def _closest_device(device: Device, there: list[Device]) -> Device:
    same = [other for other in there if other.kind == device.kind]
    accelerators = [other for other in there if other.is_accelerator]
    return max(same or accelerators or [CPU])


def unknown_module(case: MapCase) -> list[Finding]:
    """A rule of the device map covers no module and no tensor of this model.

    accelerate only warns about such a key, and the modules that were meant go wherever the rest goes.
    """
    known = _known_names(case)
    names, top_names = NameTree(known), _top_names(known)
    found: list[Finding] = []
    for rule in case.spec.rules:
        if not rule.pattern or names.covered_by(rule.pattern):
            continue
        guesses = _did_you_mean(rule.pattern, known) if len(found) < _GUESSED else []
        hint = f"did you mean {' or '.join(guesses)}?" if guesses else f"top-level names: {top_names}"
        found.append(
            Finding(
                rule="unknown-module",
                level="error",
                subject=rule.pattern,
                message=f"no module or tensor of {case.facts.architecture} is called {rule.pattern!r}",
                hint=hint,
                modules=(rule.pattern,),
            )
        )
    return _bounded(found)


def _known_names(case: MapCase) -> list[str]:
    tied = [name for group in case.facts.tied for name in group]
    return list(dict.fromkeys([*case.facts.modules, *(tensor.name for tensor in case.facts.tensors), *tied]))


def _did_you_mean(pattern: str, known: list[str]) -> list[str]:
    depth = pattern.count(".")
    numbers = re.search(r"\d+(-\d+)?", pattern)
    candidates: dict[str, None] = {}
    for name in known:
        if abs(name.count(".") - depth) <= 1:
            shown = re.sub(r"\d+", numbers.group(), name, count=1) if numbers else name
            candidates[shown] = None
    close = difflib.get_close_matches(pattern, list(candidates), n=2, cutoff=0.6)
    same_end = [name for name in candidates if name.rpartition(".")[2] == pattern.rpartition(".")[2]]
    return list(dict.fromkeys([*close, *same_end]))[:2]


def _top_names(known: list[str]) -> str:
    return names_text(
        dict.fromkeys(name for name in known if name.count(".") <= 1 and not name[-1].isdigit())
    )


def uncovered_parameters(case: MapCase) -> list[Finding]:
    """Parameters of the model that no rule of the device map covers.

    accelerate notices this only after all weights were read ("The device_map provided does not give any
    device for the following parameters"), and Transformers loads them to the cpu in silence.
    """
    if case.spec.strategy is not None:
        return []
    tensors = {tensor.name: tensor for tensor in case.facts.tensors}
    tied = [name for group in case.facts.tied for name in group if name not in tensors]
    parameters = [t.name for t in case.facts.tensors if not t.buffer] + tied
    uncovered = [name for name in parameters if case.spec.rule_for(name) is None]
    if not uncovered:
        return []
    owners = list(dict.fromkeys(_owner(name, case.facts.blocks) for name in uncovered))
    size = sum(tensors[name].size_bytes for name in uncovered if name in tensors)
    main = next((d for d in case.spec.devices if d.is_accelerator), CPU)
    return [
        Finding(
            rule="uncovered-parameters",
            level="error",
            subject=names_text(owners),
            message=f"{len(uncovered)} parameters ({format_size(size)}) have no device in the device map",
            hint=_map_text(DeviceMap(rules=(*case.spec.rules, DeviceRule("", main))), f"add rest={main}"),
            modules=tuple(owners),
            size_bytes=size,
        )
    ]


def _owner(tensor: str, blocks: tuple[str, ...]) -> str:
    for block in blocks:
        if tensor.startswith(block + "."):
            return block
    return tensor.rpartition(".")[0] or tensor


def prefix_collision(case: MapCase) -> list[Finding]:
    """A name in the device map is the beginning of other names, so other tools read the map differently.

    Transformers matches the keys of a map by an unanchored regular expression: `model.layers.1` also moves
    `model.layers.10`. Names are matched by whole components here, so the same map can mean something else
    there.
    """
    found = []
    known = frozenset(case.facts.modules)
    siblings: dict[str, list[str]] = {}
    for name in sorted(known):
        siblings.setdefault(name.rpartition(".")[0], []).append(name)
    for rule in case.spec.rules:
        if not rule.pattern or rule.pattern not in known:
            continue
        beside = siblings[rule.pattern.rpartition(".")[0]]
        alike = []
        for name in beside[bisect_left(beside, rule.pattern) + 1 :]:
            if not name.startswith(rule.pattern):
                break
            alike.append(name)
        moved = [name for name in alike if _device(case.spec, name) != rule.device]
        if moved:
            found.append(
                Finding(
                    rule="prefix-collision",
                    level="note",
                    subject=rule.pattern,
                    message=(
                        f"covers only {rule.pattern} here; Transformers would send {names_text(moved)} "
                        f"to {rule.device} as well"
                    ),
                    hint="nothing to do here; write every name out where Transformers reads the map",
                    modules=tuple(moved),
                )
            )
    return _bounded(found)


def _device(spec: DeviceMap, name: str) -> Device | None:
    rule = spec.rule_for(name)
    return rule.device if rule else None


def rule_without_effect(case: MapCase) -> list[Finding]:
    """A rule of the device map decides nothing, because more specific rules cover all that it covers."""
    names = [tensor.name for tensor in case.facts.tensors]
    there = frozenset(names)
    names += [name for group in case.facts.tied for name in group if name not in there]
    deciding: set[DeviceRule] = set()
    covering: set[int] = set()
    for name in names:
        rule = case.spec.rule_for(name)
        if rule is not None:
            deciding.add(rule)
            covering.update(place for place, _ in case.spec.rules_over(name))
    found = []
    for place, rule in enumerate(case.spec.rules):
        if rule in deciding or place not in covering:
            continue
        found.append(
            Finding(
                rule="rule-without-effect",
                level="warning",
                subject=rule.pattern or "rest",
                message=f"{str(rule)!r} decides nothing: more specific or later rules cover all of it",
                hint="take it out, or make it more specific",
            )
        )
    return _bounded(found)


def max_memory_above_free(case: MapCase) -> list[Finding]:
    """--max-memory allows more of a device than is free, so the free bytes are the limit."""
    found = []
    free = {budget.device: budget.free_bytes for budget in case.budgets}
    for device, limit in case.max_memory.limits if case.max_memory else ():
        if device in free and limit > free[device]:
            size = format_size(free[device])
            found.append(
                Finding(
                    rule="max-memory-above-free",
                    level="warning",
                    subject=str(device),
                    message=f"--max-memory allows {format_size(limit)} but {size} are free",
                    hint=f"the plan uses {size}; end other processes on {device} to use more",
                )
            )
    return found


def environment(case: MapCase) -> list[Finding]:
    """LOCAL_RANK or a variable such as CUDA_VISIBLE_DEVICES is set: an index may not mean what it seems to.

    Transformers turns the map `cuda` into `cuda:$LOCAL_RANK`; this tool always means index 0. A
    visible-devices variable renumbers the cards.
    """
    found = []
    if case.given:
        return []
    if case.environment.local_rank is not None:
        found.append(
            Finding(
                rule="environment",
                level="warning",
                subject="LOCAL_RANK",
                message=f"LOCAL_RANK={case.environment.local_rank} is set, but one process does it all",
                hint="start it without a launcher such as torchrun, or unset LOCAL_RANK",
            )
        )
    for name, value in case.environment.visible:
        found.append(
            Finding(
                rule="environment",
                level="note",
                subject=name,
                message=f"{name}={value!r} is in force: indexes count the visible devices only, from 0",
            )
        )
    return found


def _patterns_text(patterns: list[str]) -> str:
    return names_text(pattern or "rest" for pattern in patterns)


def _replaced(spec: DeviceMap, old: str | Device, new: Device) -> DeviceMap:
    """The same map with `new` for a device or for all devices of a kind."""
    rules = tuple(
        DeviceRule(rule.pattern, new) if old in (rule.device, rule.device.kind) else rule
        for rule in spec.rules
    )
    return DeviceMap(rules=rules)


RULES = (
    meta_device,
    device_absent,
    unknown_module,
    uncovered_parameters,
    prefix_collision,
    rule_without_effect,
    max_memory_above_free,
    environment,
)
