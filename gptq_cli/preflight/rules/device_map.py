"""Rules about what a device map says, before anything is placed: names, devices, limits, the environment."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from gptq_cli.findings import Finding
from gptq_cli.placement.device import Device, format_size
from gptq_cli.placement.device_map import DeviceMap, DeviceRule, MaxMemory
from gptq_cli.placement.device_rules import NameTree
from gptq_cli.planning.cases import MapCase
from gptq_cli.planning.repair import beyond_last, known_names, nearest_names, repaired, tensor_names, usable

_SHOWN = 6
_FINDINGS = 20
"""Findings of one rule about single entries of a map; what is beyond stands in one more."""
_GUESSED = 3


def names_text(names: Iterable[str]) -> str:
    """`a, b, c and 12 more`."""
    listed = list(names)
    text = ", ".join(listed[:_SHOWN])
    return f"{text} and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else text


def instead(case: MapCase) -> str:
    """The option with a map that no rule refuses, for every hint about the map of `case`."""
    return case.repair or f'--device-map "{repaired(case)}"'


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
            hint=instead(case),
            modules=tuple(patterns),
        )
    ]


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
    patterns_on: dict[Device, list[str]] = {}
    for rule in case.spec.rules:
        patterns_on.setdefault(rule.device, []).append(rule.pattern)
    absent = [d for d in case.spec.devices if d.kind not in ("disk", "meta") and d not in there]
    hint = instead(case) if absent else ""
    found = [
        Finding(
            rule="device-absent",
            level="error",
            subject=str(device),
            message=f"{device} is not {where}; there: {listed}",
            hint=hint,
            modules=tuple(patterns_on[device]) if device in patterns_on else (),
        )
        for device in absent
    ]
    limits = case.max_memory.limits if case.max_memory else ()
    present = MaxMemory(tuple((device, limit) for device, limit in limits if device in there))
    return _bounded(found) + [
        Finding(
            rule="device-absent",
            level="error",
            subject="--max-memory",
            message=f"--max-memory names {device}, which is not {where}; there: {listed}",
            hint=f'--max-memory "{present}"' if present.limits else "leave --max-memory out",
        )
        for device, _ in limits
        if device not in there
    ]


def device_not_listed(case: MapCase) -> list[Finding]:
    """The device map sends something to a device that --max-memory does not list.

    As in accelerate, --max-memory says which devices may be used at all, not only how much of each.
    """
    if case.max_memory is None:
        return []
    missing = [
        device for device in case.spec.devices if case.limit(device) is not None and not case.listed(device)
    ]
    if not missing:
        return []
    listed = ", ".join(str(device) for device, _ in case.max_memory.limits)
    wider = f'--max-memory "{case.with_unlisted(missing)}"'
    others = any(usable(case, budget.device) for budget in case.budgets)
    return [
        Finding(
            rule="device-not-listed",
            level="error",
            subject=str(device),
            message=f"the device map uses {device}, but --max-memory lists only {listed}",
            hint=f"{wider}; or {instead(case)}" if others else wider,
            modules=tuple(rule.pattern for rule in case.spec.rules if rule.device == device),
        )
        for device in missing
    ]


def max_memory_unlisted(case: MapCase) -> list[Finding]:
    """Devices are there that --max-memory does not list, so nothing is placed on them, as in accelerate."""
    left = [b.device for b in case.unlisted if b.free_bytes and b.device not in case.spec.devices]
    if not left:
        return []
    names = " and ".join(str(device) for device in left)
    return [
        Finding(
            rule="max-memory-unlisted",
            level="note",
            subject=", ".join(str(device) for device in left),
            message=f"--max-memory does not list {names}, so nothing is placed there",
            hint=f'--max-memory "{case.with_unlisted(left)}" (uses {names}, too)',
        )
    ]


def unknown_module(case: MapCase) -> list[Finding]:
    """A rule of the device map covers no module and no tensor of this model.

    accelerate only warns about such a key, and the modules that were meant go wherever the rest goes.
    """
    known = known_names(case.facts)
    names = NameTree(known)
    unknown = [
        rule.pattern for rule in case.spec.rules if rule.pattern and not names.covered_by(rule.pattern)
    ]
    offer = instead(case) if unknown else ""
    return _bounded(
        [
            Finding(
                rule="unknown-module",
                level="error",
                subject=pattern,
                message=f"no module or tensor of {case.facts.architecture} is called {pattern!r}",
                hint=f"{offer} ({_meant(pattern, known)})" if number < _GUESSED else offer,
                modules=(pattern,),
            )
            for number, pattern in enumerate(unknown)
        ]
    )


def _meant(pattern: str, known: list[str]) -> str:
    """What stands in the place of a name that does not exist."""
    there = beyond_last(pattern, known)
    if there is not None:
        return f"there is {there}"
    guesses = nearest_names(pattern, known)
    if guesses:
        return f"{' or '.join(guesses)} for {pattern}"
    return f"without {pattern}; top-level names: {_top_names(known)}"


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
    parameters = tensor_names(case.facts, buffers=False)
    uncovered = [name for name in parameters if case.rule_for(name) is None]
    if not uncovered:
        return []
    owners = list(dict.fromkeys(_owner(name, case.facts.blocks) for name in uncovered))
    size = sum(tensors[name].size_bytes for name in uncovered if name in tensors)
    return [
        Finding(
            rule="uncovered-parameters",
            level="error",
            subject=names_text(owners),
            message=f"{len(uncovered)} parameters ({format_size(size)}) have no device in the device map",
            hint=instead(case),
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
    names = tensor_names(case.facts)
    deciding: set[DeviceRule] = set()
    covering: set[int] = set()
    for name in names:
        rule = case.spec.rule_for(name)
        if rule is not None:
            deciding.add(rule)
            covering.update(place for place, _ in case.spec.rules_over(name))
    rules = enumerate(case.spec.rules)
    idle = [rule for place, rule in rules if rule not in deciding and place in covering]
    found, offer = [], instead(case) if idle else ""
    for rule in idle:
        found.append(
            Finding(
                rule="rule-without-effect",
                level="warning",
                subject=rule.pattern or "rest",
                message=f"{str(rule)!r} decides nothing: more specific or later rules cover all of it",
                hint=f"{offer} (without it)",
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


def untraced_forward(case: MapCase) -> list[Finding]:
    """A forward of the model without data did not come to its end.

    Before a weight is read, a few tokens go through the model on torch's `meta` device, where shapes are
    computed and values are not. That shows in which order modules run, which linears read the same input,
    which are experts, and which have their weight read by other code and so must stay dense. A model whose
    code needs values that nobody can answer stops on the way. Then the order of modules is that of their
    registration, memory is planned by the shapes of linears, and what lies behind the stop is not known to
    be called at all.
    """
    if not case.facts.untraced:
        return []
    return [
        Finding(
            rule="untraced-forward",
            level="warning",
            subject=case.facts.model,
            message="a forward without data did not come to its end; order, memory and the choice of linears "
            f"are estimated from shapes: it stopped {case.facts.untraced}",
            hint="prove the result with gptq load --verify and --against, and report this with config.json",
        )
    ]


def _patterns_text(patterns: list[str]) -> str:
    return names_text(pattern or "rest" for pattern in patterns)


RULES = (
    meta_device,
    device_absent,
    device_not_listed,
    unknown_module,
    uncovered_parameters,
    prefix_collision,
    rule_without_effect,
    max_memory_above_free,
    max_memory_unlisted,
    environment,
    untraced_forward,
)
