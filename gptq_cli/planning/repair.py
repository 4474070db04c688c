"""A device map without what rules about it refuse, so that a hint can be followed as it stands.

A hint that repairs one fault and repeats the others is refused when it is followed. So every rule about a map
offers the same one, `repaired`: names that exist, devices that are there and may be used, whole blocks, tied
tensors together, every parameter covered, and no rule that decides nothing. Whether it fits in memory is not
known here; `resolve` tries it, and offers `auto` where it does not fit and `auto` does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import DeviceMap, DeviceRule
from gptq_cli.placement.device_rules import NameTree
from gptq_cli.placement.names import owner, parents
from gptq_cli.planning.cases import MapCase

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
"""A component of a name that is a number."""
_VARIABLE = re.compile(r"(?<![^.])(?:[0-9]+(?:-[0-9]+)?|[^.]*[*?\[][^.]*)(?![^.])")
"""A component of a pattern that is a number, a range or a glob."""
_MAX_RULES = 500
"""A longer map is a program's, which is mended where it was made; `auto` stands in for it here."""
_MAX_GUESSES = 20
"""Misspelled names that are looked for; a map with more was not mistyped."""
_NAMED = 2


def repaired(case: MapCase) -> DeviceMap:
    """The map of `case` without what rules about maps would refuse. A strategy is returned as it is."""
    if case.spec.strategy is not None:
        return case.spec
    if len(case.spec.rules) > _MAX_RULES:
        return DeviceMap(strategy="auto")
    rules = _on_usable_devices(case, _with_known_names(case, case.spec.rules))
    if not rules:
        return DeviceMap(strategy="auto")
    rules = _covering(case, rules)
    rules = _with_whole_blocks(case.facts, rules)
    rules = _with_ties(case.facts, rules)
    return DeviceMap(rules=_deciding(case.facts, rules))


def in_runs(case: MapCase, devices: dict[str, Device]) -> DeviceMap:
    """The map of `case` with as many blocks on each device as `devices` says, in one run; what is not a block
    stays where it is."""
    first_use = list(dict.fromkeys(devices.values()))
    wanted = dict(zip(devices, sorted(devices.values(), key=first_use.index), strict=True))
    blocks = tuple(f"{block}." for block in case.facts.blocks)
    outside = [t.name for t in case.facts.tensors if not t.name.startswith(blocks)]
    kept = [rule for rule in case.spec.rules if rule.pattern and any(map(rule.covers, outside))]
    rest = next((rule for rule in case.spec.rules if not rule.pattern), DeviceRule("", first_use[0]))
    rules = (*_runs(tuple(devices), wanted), *kept, rest)
    return repaired(replace(case, spec=DeviceMap(rules=rules)))


def known_names(facts: ModelFacts) -> list[str]:
    """Every name that a rule may use: modules, tensors, and tied tensors under all their names."""
    tied = [name for group in facts.tied for name in group]
    return list(dict.fromkeys([*facts.modules, *(tensor.name for tensor in facts.tensors), *tied]))


def tensor_names(facts: ModelFacts, *, buffers: bool = True) -> list[str]:
    """Names of all tensors, tied ones under all their names."""
    names = [tensor.name for tensor in facts.tensors if buffers or not tensor.buffer]
    known = {tensor.name for tensor in facts.tensors}
    return names + [name for group in facts.tied for name in group if name not in known]


def usable(case: MapCase, device: Device) -> bool:
    """True for a device that is there, holds data, and is not left out by --max-memory."""
    return case.limit(device) is not None and case.listed(device)


def closest_device(case: MapCase, device: Device) -> Device:
    """The usable device that is most like `device`: one of its kind, any accelerator, the cpu."""
    there = [budget.device for budget in case.budgets if usable(case, budget.device)]
    same = [other for other in there if other.kind == device.kind]
    accelerators = [other for other in there if other.is_accelerator]
    return max(same or accelerators or [CPU])


def nearest_names(pattern: str, known: list[str]) -> list[str]:
    """The `_NAMED` patterns that cover something and are spelled most like `pattern`, which covers nothing.

    Numbers, ranges and globs of `pattern` are kept where they cover something. Empty where only a number is
    wrong: nothing that exists was meant.
    """
    if beyond_last(pattern, known):
        return []
    depth, variable = pattern.count("."), _VARIABLE.search(pattern)
    names = NameTree(known)
    valid: dict[str, bool] = {}
    candidates: dict[str, None] = {}
    for name in known:
        if abs(name.count(".") - depth) > 1:
            continue
        shown = _NUMBER.sub(variable.group(), name, count=1) if variable else name
        if shown not in valid:
            valid[shown] = shown == name or names.covered_by(shown)
        candidates.setdefault(shown if valid[shown] else name)
    close = difflib.get_close_matches(pattern, list(candidates), n=_NAMED, cutoff=0.6)
    same_end = [name for name in candidates if name.rpartition(".")[2] == pattern.rpartition(".")[2]]
    return list(dict.fromkeys([*close, *same_end]))[:_NAMED]


def beyond_last(pattern: str, known: list[str]) -> str | None:
    """`model.layers.0-11`: what there is, where `pattern` is right but for its numbers; else None."""
    number = _VARIABLE.search(pattern)
    if number is None:
        return None
    prefix, any_number = pattern[: number.start()], DeviceRule(_VARIABLE.sub("*", pattern), CPU)
    found = [name for name in known if any_number.covers(name)]
    numbers = [int(part) for name in found if (part := name[len(prefix) :].partition(".")[0]).isdigit()]
    return f"{prefix}{min(numbers)}-{max(numbers)}" if numbers else None


def _with_known_names(case: MapCase, rules: tuple[DeviceRule, ...]) -> tuple[DeviceRule, ...]:
    """Misspelled names replaced by the nearest real one, unless that has a rule already; others dropped."""
    known = known_names(case.facts)
    names = NameTree(known)
    patterns = {rule.pattern for rule in rules}
    kept, guesses = [], 0
    for rule in rules:
        if not rule.pattern or names.covered_by(rule.pattern):
            kept.append(rule)
            continue
        guesses += 1
        guess = next(iter(nearest_names(rule.pattern, known)), None) if guesses <= _MAX_GUESSES else None
        if guess is not None and guess not in patterns:
            patterns.add(guess)
            kept.append(replace(rule, pattern=guess))
    return tuple(kept)


def _on_usable_devices(case: MapCase, rules: tuple[DeviceRule, ...]) -> tuple[DeviceRule, ...]:
    """Absent, unlisted and data-less devices replaced by the closest that may be used."""
    changed = []
    for rule in rules:
        device = rule.device
        if not usable(case, device):
            held = device if device.kind not in ("meta", "disk") else CPU
            device = held if usable(case, held) else closest_device(case, held)
        changed.append(replace(rule, device=device))
    return tuple(changed)


def _covering(case: MapCase, rules: tuple[DeviceRule, ...]) -> tuple[DeviceRule, ...]:
    """A rule for the rest, where parameters have none."""
    spec = DeviceMap(rules=rules)
    asked = replace(case, spec=spec)
    if all(asked.rule_for(name) is not None for name in tensor_names(case.facts, buffers=False)):
        return rules
    main = next((device for device in spec.devices if device.is_accelerator), spec.devices[0])
    return (*rules, DeviceRule("", main))


def _with_whole_blocks(facts: ModelFacts, rules: tuple[DeviceRule, ...]) -> tuple[DeviceRule, ...]:
    """Each block on the device that most of its bytes are on; rules inside of blocks are dropped."""
    spec = DeviceMap(rules=rules)
    wanted: dict[str, Device] = {}
    split = False
    for block in facts.blocks:
        sizes: dict[Device, int] = {}
        for tensor in facts.tensors:
            rule = spec.rule_for(tensor.name) if tensor.name.startswith(block + ".") else None
            if rule is not None:
                sizes[rule.device] = sizes.get(rule.device, 0) + tensor.size_bytes
        if sizes:
            wanted[block] = max(sorted(sizes), key=lambda device: sizes[device])
            split = split or len(sizes) > 1
    if not split:
        return rules
    depth = max(block.count(".") for block in wanted)
    inner = [rule for rule in rules if rule.pattern.count(".") > depth and _inside(rule, facts)]
    kept = [rule for rule in rules if rule not in inner]
    kept += [rule for rule in _runs(facts.blocks, wanted) if not _agrees(kept, rule, facts.blocks)]
    for block, device in wanted.items():
        found = DeviceMap(rules=tuple(kept)).rule_for(block) if kept else None
        if found is None or found.device != device:
            kept = [rule for rule in kept if rule.pattern != block] + [DeviceRule(block, device)]
    return tuple(kept)


def _inside(rule: DeviceRule, facts: ModelFacts) -> bool:
    """True where all that the rule covers lies inside of blocks."""
    blocks = tuple(f"{block}." for block in facts.blocks)
    return all(name.startswith(blocks) for name in known_names(facts) if rule.covers(name))


def _agrees(rules: list[DeviceRule], run: DeviceRule, blocks: tuple[str, ...]) -> bool:
    """True where every block of the run is on its device already."""
    if not rules:
        return False
    spec = DeviceMap(rules=tuple(rules))
    found = [spec.rule_for(block) for block in blocks if run.covers(block)]
    return all(rule is not None and rule.device == run.device for rule in found)


def _runs(blocks: tuple[str, ...], wanted: dict[str, Device]) -> Iterator[DeviceRule]:
    """Neighbouring blocks on one device as one rule with a range."""
    start = 0
    for at in range(1, len(blocks) + 1):
        if at < len(blocks) and wanted.get(blocks[at]) == wanted.get(blocks[start]):
            continue
        device = wanted.get(blocks[start])
        prefix, _, first = blocks[start].rpartition(".")
        last = blocks[at - 1].rpartition(".")[2]
        numbered = first.isdigit() and last.isdigit() and int(last) - int(first) == at - 1 - start
        if device is not None and at - start == 1:
            yield DeviceRule(blocks[start], device)
        elif device is not None and numbered:
            yield DeviceRule(f"{prefix}.{first}-{last}", device)
        start = at


def _with_ties(facts: ModelFacts, rules: tuple[DeviceRule, ...]) -> tuple[DeviceRule, ...]:
    """Tensors that are one on the device of the first of their names, and whole blocks with them."""
    blocks = frozenset(facts.blocks)
    for group in facts.tied:
        spec = DeviceMap(rules=rules)
        first = spec.rule_for(group[0])
        for name in group[1:] if first is not None else ():
            rule = spec.rule_for(name)
            if first is None or rule is None or rule.device == first.device:
                continue
            block = next((above for above in parents(name) if above in blocks), None)
            pattern = block or (name if rule.pattern == name else owner(name))
            inner = f"{block}." if block is not None else pattern
            kept = (r for r in rules if r.pattern != pattern and not r.pattern.startswith(inner))
            rules = (*kept, DeviceRule(pattern, first.device))
            spec = DeviceMap(rules=rules)
    return rules


def _deciding(facts: ModelFacts, rules: tuple[DeviceRule, ...]) -> tuple[DeviceRule, ...]:
    """The rules that decide about some tensor."""
    spec = DeviceMap(rules=rules)
    deciding = {rule.pattern for name in tensor_names(facts) if (rule := spec.rule_for(name)) is not None}
    return tuple(rule for rule in rules if rule.pattern in deciding) or rules
