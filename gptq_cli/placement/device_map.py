"""What `--device-map`, `--max-memory` and `--devices` mean.

Four spellings say where modules go:

    auto | balanced | balanced_low_0 | sequential       a strategy: preflight makes the plan
    cuda:1                                              one device for everything
    {"model.layers.0": 0, "": "cpu"}                    a JSON object, inline or in @file.json (or .toml)
    model.embed_tokens=0,model.layers.0-15=1,rest=cpu   the compact form, made for shells

A *pattern* is a dotted name. It covers the module or tensor of that name and everything below it, by whole
components: `model.layers.1` never covers `model.layers.10`. A component may be a range (`0-15`, both ends
included) or a glob (`*`, `?`, `[ab]`) that stands for exactly one component; "" (in the compact form: `rest`)
covers everything. The more specific rule wins: more components first, then more plain components, then more
ranges, then the rule written later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from gptq_cli.errors import DeviceMapError
from gptq_cli.placement.device import (
    ALLOWED_DEVICE,
    INDEXED_KINDS,
    Device,
    DeviceLike,
    exact_size,
    is_bare_index,
    parse_capacity,
    syntax_error,
)
from gptq_cli.placement.device_rules import RANGE, PatternTree, component_matches, is_glob, is_plain
from gptq_cli.placement.grammar import Pair, in_file, read_map_file, scan_compact, scan_json_object

Strategy = Literal["auto", "balanced", "balanced_low_0", "sequential"]

STRATEGIES: tuple[str, ...] = get_args(Strategy)
ALLOWED_MAP = (
    "auto, balanced, balanced_low_0, sequential, a device (cpu, cuda:0, xpu:0, mps, 0), a JSON object, "
    "@FILE, or NAME=DEVICE,…"
)
REST = "rest"

RULES_LIMIT = 10_000
"""A rule covers everything below what it names, and the largest models have a few hundred blocks."""
WILD_LIMIT = 1_000
"""Rules with a range or a glob; a rule of plain names costs next to nothing."""
_FORBIDDEN = re.compile(r"[\s=,{}\"'\\@:]")


@dataclass(frozen=True, slots=True)
class DeviceRule:
    """Everything that `pattern` covers goes to `device`."""

    pattern: str
    device: Device
    bare: bool = field(default=False, compare=False, repr=False)
    """Written as a bare index, so its kind is whatever accelerator the machine has."""

    def covers(self, name: str) -> bool:
        """True when `name` is what the pattern names, or lies below it."""
        if not self.pattern:
            return True
        wanted, found = self.pattern.split("."), name.split(".")
        return len(found) >= len(wanted) and all(
            component_matches(p, c) for p, c in zip(wanted, found, strict=False)
        )

    @property
    def specificity(self) -> tuple[int, int, int]:
        """(components, plain components, ranges): the greater one wins."""
        parts = self.pattern.split(".") if self.pattern else []
        ranges = sum(1 for part in parts if RANGE.match(part))
        globs = sum(1 for part in parts if is_glob(part))
        return len(parts), len(parts) - ranges - globs, ranges

    def __str__(self) -> str:
        return f"{self.pattern or REST}={self.device}"


def _on(device: Device, accelerator: str) -> Device:
    """`device`, written as a bare index, on a machine whose accelerators are of the kind `accelerator`."""
    if accelerator in INDEXED_KINDS or (accelerator == "mps" and device.index == 0):
        return Device(accelerator, device.index)
    return device


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """A strategy, or rules. Exactly one of the two. `DeviceMap.parse(str(m)) == m`."""

    strategy: str | None = None
    rules: tuple[DeviceRule, ...] = ()
    _tree: PatternTree = field(init=False, default_factory=PatternTree, compare=False, repr=False)

    def __post_init__(self) -> None:
        if (self.strategy is None) == (not self.rules):
            raise DeviceMapError("a device map is a strategy or a list of rules, and exactly one of them")
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise DeviceMapError(
                f"{self.strategy!r} is not a strategy; allowed: {', '.join(STRATEGIES)}", hint="write auto"
            )
        for number, rule in enumerate(self.rules):
            self._tree.add(rule.pattern, number)

    @staticmethod
    def parse(value: object, accelerator: str = "cuda") -> DeviceMap:
        """Read a text, a mapping of names to devices, or one device. Raises `DeviceMapError`.

        Bare indexes mean the kind `accelerator` and are remembered, see `on`.
        """
        if isinstance(value, DeviceMap):
            return value
        if isinstance(value, Mapping):
            pairs = [Pair(str(key), item, None, None) for key, item in value.items()]
            return _from_pairs(pairs, "", accelerator)
        if isinstance(value, str):
            return _parse_map_text(value, accelerator)
        return DeviceMap(rules=(DeviceRule("", Device.parse(value, accelerator), is_bare_index(value)),))

    def __str__(self) -> str:
        if self.strategy is not None:
            return self.strategy
        if len(self.rules) == 1 and not self.rules[0].pattern:
            return str(self.rules[0].device)
        return ",".join(str(rule) for rule in self.rules)

    def on(self, accelerator: str) -> DeviceMap:
        """The same map with every bare index meaning the kind `accelerator`."""
        rules = tuple(replace(r, device=_on(r.device, accelerator)) if r.bare else r for r in self.rules)
        return replace(self, rules=rules)

    def rule_for(self, name: str) -> DeviceRule | None:
        """The rule that decides about the module or tensor `name`; None when none covers it."""
        covering = self.rules_over(name)
        return max(covering, key=lambda pair: (pair[1].specificity, pair[0]))[1] if covering else None

    def rules_over(self, name: str) -> tuple[tuple[int, DeviceRule], ...]:
        """(place, rule) of every rule that covers the module or tensor `name`."""
        return tuple((number, self.rules[number]) for number in self._tree.covering(name))

    @property
    def devices(self) -> tuple[Device, ...]:
        """The distinct devices that the rules name, in order; () for a strategy."""
        return tuple(sorted({rule.device for rule in self.rules}))


@dataclass(frozen=True, slots=True)
class MaxMemory:
    """How much of each device may be used. `MaxMemory.parse(str(m)) == m`."""

    limits: tuple[tuple[Device, int], ...]
    bare: frozenset[Device] = field(default=frozenset(), compare=False, repr=False)
    """Devices written as a bare index, see `DeviceMap.on`."""

    @staticmethod
    def parse(value: object, accelerator: str = "cuda", *, what: str = "max memory") -> MaxMemory:
        """Read `"0=20GiB,cpu=48GiB"`, or a mapping of devices to sizes. `what` opens error messages."""
        if isinstance(value, MaxMemory):
            return value
        text = value if isinstance(value, str) else ""
        hint = "write for example 0=20GiB,cpu=48GiB"
        if isinstance(value, str):
            if not value.strip():
                raise syntax_error(what, text, 0, "is empty; allowed: DEVICE=SIZE,…", hint=hint)
            pairs = list(scan_compact(text, what, "SIZE"))
        elif isinstance(value, Mapping):
            pairs = [Pair(str(key), item, None, None) for key, item in value.items()]
        else:
            raise DeviceMapError(f"{what}: {repr(value)[:60]} is not text; allowed: DEVICE=SIZE,…", hint=hint)

        def located(error: DeviceMapError, at: int | None) -> DeviceMapError:
            if at is None:
                return DeviceMapError(f"{what}: {error.message}", hint=error.hint or hint)
            return syntax_error(what, text, at, error.message, hint=error.hint or hint)

        limits: dict[Device, int] = {}
        bare: set[Device] = set()
        for pair in pairs:
            try:
                device = Device.parse(pair.key.strip(), accelerator)
                if device.kind in ("disk", "meta"):
                    raise DeviceMapError(f"{str(device)!r} holds no weights here; allowed: {ALLOWED_DEVICE}")
                if device in limits:
                    raise DeviceMapError(f"{str(device)!r} is given twice", hint="keep one of the two")
            except DeviceMapError as error:
                raise located(error, pair.key_at) from None
            try:
                limits[device] = parse_capacity(pair.value)
            except DeviceMapError as error:
                raise located(error, pair.value_at) from None
            if is_bare_index(pair.key.strip()):
                bare.add(device)
        if not limits:
            raise DeviceMapError(f"{what}: is empty; allowed: DEVICE=SIZE,…", hint=hint)
        return MaxMemory(tuple(limits.items()), frozenset(bare))

    def get(self, device: Device) -> int | None:
        """The limit of `device` in bytes; None when none was given."""
        return dict(self.limits).get(device)

    def on(self, accelerator: str) -> MaxMemory:
        """The same limits with every bare index meaning the kind `accelerator`."""
        moved = (
            (_on(device, accelerator) if device in self.bare else device, size)
            for device, size in self.limits
        )
        return MaxMemory(tuple(moved))

    def __str__(self) -> str:
        return ",".join(f"{device}={exact_size(size)}" for device, size in self.limits)


def _located(text: str, position: int | None, message: str, hint: str | None) -> DeviceMapError:
    if position is None:
        return DeviceMapError(f"device map: {message}", hint=hint)
    return syntax_error("device map", text, position, message, hint=hint)


def _from_pairs(pairs: list[Pair], text: str, accelerator: str) -> DeviceMap:
    if not pairs:
        raise _located(
            text, 0 if text else None, f"is empty; allowed: {ALLOWED_MAP}", "use --device-map auto"
        )
    if len(pairs) > RULES_LIMIT:
        raise _located(
            text,
            None,
            f"has {len(pairs)} rules; allowed: {RULES_LIMIT}",
            "name blocks, not their parts: a rule covers everything below what it names",
        )
    rules: dict[str, DeviceRule] = {}
    for pair in pairs:
        pattern = _checked_pattern(pair, text)
        if not isinstance(pair.value, (int, str, Device)) and not isinstance(pair.value, DeviceLike):
            shown = json.dumps(pair.value, default=repr)[:60]
            raise _located(
                text,
                pair.value_at,
                f"{shown} is not a device for {pair.key!r}; allowed: {ALLOWED_DEVICE}",
                None,
            )
        try:
            device = Device.parse(pair.value, accelerator)
        except DeviceMapError as error:
            raise _located(text, pair.value_at, error.message, error.hint) from None
        if pattern in rules and rules[pattern].device != device:
            raise _located(
                text,
                pair.key_at,
                f"{pattern or REST!r} is given twice, for {rules[pattern].device} and {device}",
                "keep one of the two",
            )
        rules[pattern] = DeviceRule(pattern, device, is_bare_index(pair.value))
    wild = sum(not all(map(is_plain, pattern.split("."))) for pattern in rules)
    if wild > WILD_LIMIT:
        raise _located(
            text,
            None,
            f"{wild} rules have a range or a glob; allowed: {WILD_LIMIT}",
            "write plain names, which may be many",
        )
    return DeviceMap(rules=tuple(rules.values()))


def check_pattern(pattern: str) -> None:
    """Raise `DeviceMapError` unless `pattern` is a dotted name with ranges and globs, as a rule has it."""
    _checked_pattern(Pair(pattern, None), "")


def _checked_pattern(pair: Pair, text: str) -> str:
    """The pattern of a pair in canonical form ("" for the rest), or an error at its first bad character."""
    key = pair.key.strip()
    if key in ("", REST):
        return ""
    offset = pair.key.index(key)
    at = None if pair.key_at is None else pair.key_at + offset
    allowed = "allowed: dotted names with ranges (0-15) and globs (*), or rest"
    bad = _FORBIDDEN.search(key)
    if bad or not key.isprintable():
        index = bad.start() if bad else next(i for i, c in enumerate(key) if not c.isprintable())
        where = None if at is None else at + index
        raise _located(
            text, where, f"{key[index]!r} cannot stand in the module name {key[:60]!r}; {allowed}", None
        )
    position = 0
    for component in key.split("."):
        where = None if at is None else at + position
        if not component:
            raise _located(text, where, f"empty component in the module name {key[:60]!r}; {allowed}", None)
        if "**" in component:
            hint = "leave ** out: a rule covers everything below what it names"
            raise _located(text, where, f"'**' is not a glob here, in {key[:60]!r}; {allowed}", hint)
        ends = RANGE.match(component)
        if ends and int(ends[1]) > int(ends[2]):
            hint = f"write {ends[2]}-{ends[1]}"
            raise _located(text, where, f"range {component!r} runs backwards in {key[:60]!r}", hint)
        position += len(component) + 1
    return key


def _parse_map_text(text: str, accelerator: str) -> DeviceMap:
    stripped = text.strip()
    start = len(text) - len(text.lstrip())
    if not stripped:
        hint = "use --device-map auto"
        raise syntax_error("device map", text, 0, f"is empty; allowed: {ALLOWED_MAP}", hint=hint)
    if stripped[0] == "@":
        return _parse_map_file(text, accelerator)
    if stripped[0] in "{[\"'":
        return _from_pairs(list(scan_json_object(text, start)), text, accelerator)
    if stripped in STRATEGIES:
        return DeviceMap(strategy=stripped)
    if stripped.lower() in STRATEGIES:
        hint = f"write {stripped.lower()}"
        raise syntax_error("device map", text, start, f"{stripped!r} must be lower case", hint=hint)
    if "=" in stripped or "," in stripped:
        return _from_pairs(list(scan_compact(text, "device map", "DEVICE")), text, accelerator)
    try:
        device = Device.parse(stripped, accelerator)
    except DeviceMapError as error:
        message = error.message.replace("is not a device;", "is not a device map;").replace(
            ALLOWED_DEVICE, ALLOWED_MAP
        )
        raise syntax_error("device map", text, start, message, hint=error.hint) from None
    return DeviceMap(rules=(DeviceRule("", device, is_bare_index(stripped)),))


def _parse_map_file(spec: str, accelerator: str) -> DeviceMap:
    file = read_map_file(spec)
    try:
        if file.single is not None:
            if isinstance(file.single, str) and file.single.strip().startswith("@"):
                raise DeviceMapError("device map: a file cannot name another file")
            return DeviceMap.parse(file.single, accelerator)
        located = any(pair.key_at is not None for pair in file.pairs)
        return _from_pairs(list(file.pairs), file.content if located else "", accelerator)
    except DeviceMapError as error:
        raise in_file(file.name, error) from None
