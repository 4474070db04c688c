"""Rules about what a device map says, before anything is placed: names, devices, limits, the environment."""

from __future__ import annotations

from bisect import bisect_left

from gptq_cli.placement.device import Device, format_size
from gptq_cli.placement.device_map import DeviceMap, DeviceRule, MaxMemory
from gptq_cli.placement.device_rules import NameTree
from gptq_cli.placement.names import owner
from gptq_cli.planning.cases import MapCase
from gptq_cli.planning.repair import beyond_last, known_names, nearest_names, repaired, tensor_names, usable
from gptq_cli.rules import Remark, rule
from gptq_cli.wording import names_text, number_of

_FINDINGS = 20
"""Findings of one rule about single entries of a map; what is beyond stands in one more."""
_GUESSED = 3


def instead(case: MapCase) -> str:
    """The option with a map that no rule refuses, for the hints about the map of `case`."""
    return case.repair or f'--device-map "{repaired(case)}"'


@rule("error")
def meta_device(case: MapCase) -> list[Remark]:
    """The device map sends something to `meta`.

    `meta` is torch's device for tensors without data. Transformers accepts it as a device map and loads
    nothing there; quantizing such a module fails much later. It is refused here.
    """
    patterns = [entry.pattern for entry in case.spec.rules if entry.device.kind == "meta"]
    if not patterns:
        return []
    return [
        Remark(
            subject=_patterns_text(patterns),
            message="'meta' holds no data, so nothing can be quantized there; allowed: an accelerator or cpu",
            hint=instead(case),
            modules=tuple(patterns),
        )
    ]


def _bounded(found: list[Remark]) -> list[Remark]:
    """The first remarks, and one for the rest: a map may have 100,000 entries that are all wrong."""
    rest = found[_FINDINGS:]
    if len(rest) < 2:
        return found
    more = Remark(
        subject=names_text(remark.subject for remark in rest),
        message=f"the same holds for {len(rest)} more entries of the device map",
        hint="repair the first ones, then look again",
        modules=tuple(name for remark in rest[:_FINDINGS] for name in remark.modules[:_FINDINGS]),
    )
    return [*found[:_FINDINGS], more]


@rule("error")
def device_absent(case: MapCase) -> list[Remark]:
    """The device map or --max-memory names a device that this machine (or --devices) does not have.

    Transformers does not check indexes; the first transfer to the device dies, after the weights were read.
    """
    there = [budget.device for budget in case.budgets]
    listed = ", ".join(str(device) for device in there)
    where = "in --devices" if case.given else "on this machine"
    patterns_on: dict[Device, list[str]] = {}
    for entry in case.spec.rules:
        patterns_on.setdefault(entry.device, []).append(entry.pattern)
    absent = [d for d in case.spec.devices if d.kind not in ("disk", "meta") and d not in there]
    hint = instead(case) if absent else ""
    found = [
        Remark(
            subject=str(device),
            message=f"{device} is not {where}; available: {listed}",
            hint=hint,
            modules=tuple(patterns_on[device]) if device in patterns_on else (),
        )
        for device in absent
    ]
    limits = case.max_memory.limits if case.max_memory else ()
    present = MaxMemory(tuple((device, limit) for device, limit in limits if device in there))
    return _bounded(found) + [
        Remark(
            subject="--max-memory",
            message=f"--max-memory names {device}, which is not {where}; available: {listed}",
            hint=f'--max-memory "{present}"' if present.limits else "leave --max-memory out",
        )
        for device, _ in limits
        if device not in there
    ]


@rule("error")
def device_not_listed(case: MapCase) -> list[Remark]:
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
        Remark(
            subject=str(device),
            message=f"the device map uses {device}, but --max-memory lists only {listed}",
            hint=f"{wider}; or {instead(case)}" if others else wider,
            modules=tuple(entry.pattern for entry in case.spec.rules if entry.device == device),
        )
        for device in missing
    ]


@rule("error")
def unknown_module(case: MapCase) -> list[Remark]:
    """A rule of the device map covers no module and no tensor of this model.

    accelerate only warns about such a key, and the modules that were meant go wherever the rest goes.
    """
    known = known_names(case.facts)
    names = NameTree(known)
    unknown = [
        entry.pattern for entry in case.spec.rules if entry.pattern and not names.covered_by(entry.pattern)
    ]
    offer = instead(case) if unknown else ""
    return _bounded(
        [
            Remark(
                subject=pattern,
                message=f"no module or tensor of {case.facts.architecture} is called {pattern!r}",
                hint=f"{offer} ({_meant(pattern, known)})" if number < _GUESSED else offer,
                modules=(pattern,),
            )
            for number, pattern in enumerate(unknown)
        ]
    )


def _meant(pattern: str, known: list[str]) -> str:
    """What may have been meant by a name that does not exist."""
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


@rule("error")
def uncovered_parameters(case: MapCase) -> list[Remark]:
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
        Remark(
            subject=names_text(owners),
            message=f"{number_of(len(uncovered), 'parameter')} ({format_size(size)}) "
            f"{'has' if len(uncovered) == 1 else 'have'} no device in the device map",
            hint=instead(case),
            modules=tuple(owners),
            size_bytes=size,
        )
    ]


def _owner(tensor: str, blocks: tuple[str, ...]) -> str:
    for block in blocks:
        if tensor.startswith(block + "."):
            return block
    return owner(tensor)


@rule("note")
def prefix_collision(case: MapCase) -> list[Remark]:
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
    for entry in case.spec.rules:
        if not entry.pattern or entry.pattern not in known:
            continue
        beside = siblings[entry.pattern.rpartition(".")[0]]
        alike = []
        for name in beside[bisect_left(beside, entry.pattern) + 1 :]:
            if not name.startswith(entry.pattern):
                break
            alike.append(name)
        moved = [name for name in alike if _device(case.spec, name) != entry.device]
        if moved:
            found.append(
                Remark(
                    subject=entry.pattern,
                    message=(
                        f"covers only {entry.pattern} here; Transformers would send {names_text(moved)} "
                        f"to {entry.device} as well"
                    ),
                    hint="nothing to do here; write every name out where Transformers reads the map",
                    modules=tuple(moved),
                )
            )
    return _bounded(found)


def _device(spec: DeviceMap, name: str) -> Device | None:
    decisive = spec.rule_for(name)
    return decisive.device if decisive else None


@rule("warning")
def rule_without_effect(case: MapCase) -> list[Remark]:
    """A rule of the device map decides nothing, because more specific rules cover all that it covers."""
    names = tensor_names(case.facts)
    deciding: set[DeviceRule] = set()
    covering: set[int] = set()
    for name in names:
        decisive = case.spec.rule_for(name)
        if decisive is not None:
            deciding.add(decisive)
            covering.update(place for place, _ in case.spec.rules_over(name))
    entries = enumerate(case.spec.rules)
    idle = [entry for place, entry in entries if entry not in deciding and place in covering]
    found, offer = [], instead(case) if idle else ""
    for entry in idle:
        found.append(
            Remark(
                subject=entry.pattern or "rest",
                message=f"{str(entry)!r} decides nothing: more specific or later rules cover all of it",
                hint=f"{offer} (without it)",
            )
        )
    return _bounded(found)


@rule("warning")
def max_memory_above_free(case: MapCase) -> list[Remark]:
    """--max-memory allows more of a device than is free, so the free bytes are the limit."""
    found = []
    free = {budget.device: budget.free_bytes for budget in case.budgets}
    for device, limit in case.max_memory.limits if case.max_memory else ():
        if device in free and limit > free[device]:
            size = format_size(free[device])
            found.append(
                Remark(
                    subject=str(device),
                    message=f"--max-memory allows {format_size(limit)} but {size} are free",
                    hint=f"the plan uses {size}; end other processes on {device} to use more",
                )
            )
    return found


@rule("note")
def max_memory_unlisted(case: MapCase) -> list[Remark]:
    """The machine has devices that --max-memory does not list, so they stay unused, as in accelerate."""
    left = [b.device for b in case.unlisted if b.free_bytes and b.device not in case.spec.devices]
    if not left:
        return []
    names = " and ".join(str(device) for device in left)
    return [
        Remark(
            subject=", ".join(str(device) for device in left),
            message=f"--max-memory does not list {names}, so nothing is placed there",
            hint=f'--max-memory "{case.with_unlisted(left)}" (uses {names}, too)',
        )
    ]


@rule("warning", "note")
def environment(case: MapCase) -> list[Remark]:
    """LOCAL_RANK or a variable such as CUDA_VISIBLE_DEVICES is set: an index may not mean what it seems to.

    Transformers turns the map `cuda` into `cuda:$LOCAL_RANK`; this tool always means index 0. A
    visible-devices variable renumbers the cards.
    """
    found = []
    if case.given:
        return []
    if case.environment.local_rank is not None:
        found.append(
            Remark(
                level="warning",
                subject="LOCAL_RANK",
                message=f"LOCAL_RANK={case.environment.local_rank} is set, but one process does all the work",
                hint="start it without a launcher such as torchrun, or unset LOCAL_RANK",
            )
        )
    for name, value in case.environment.visible:
        found.append(
            Remark(
                level="note",
                subject=name,
                message=f"{name}={value!r} is in force: indexes count the visible devices only, from 0",
            )
        )
    return found


@rule("warning")
def untraced_forward(case: MapCase) -> list[Remark]:
    """A forward of the model without data stopped before its end: order and memory are estimates.

    Before a weight is read, a few tokens go through the model on torch's `meta` device, where shapes are
    computed and values are not. That shows in which order modules run, which linears read the same input,
    which are experts, and which have their weight read by other code and so must stay dense. A model whose
    code needs values stops on the way. Then modules are taken in the order of their registration, memory is
    planned by the shapes of linears, routers of experts are told by their names, and whether the modules
    behind the stop are called at all is not known.
    """
    if not case.facts.untraced:
        return []
    return [
        Remark(
            subject=case.facts.model,
            message="a forward without data did not reach its end; order, memory and the choice of linears "
            f"are estimated from shapes and names: it stopped {case.facts.untraced}",
            hint="prove the result with gptq load --verify and --against, and report this with config.json",
        )
    ]


def _patterns_text(patterns: list[str]) -> str:
    return names_text(pattern or "rest" for pattern in patterns)
