"""Settings by module: which linears get other bits, groups or symmetry than the rest, or stay dense.

    --module 'model.layers.*.mlp.down_proj=bits:8,group:64'
    --module 'model.layers.0-3=bits:8'                       everything below what the pattern names
    --module 'model.layers.*.linear_attn.in_proj_a=dense'

Patterns are those of a device map: dotted names with ranges (0-15) and globs (*) in a component. All rules
that cover a linear apply, in the order in which they are given: of two that set the same thing the later one
wins, `dense` sets aside what was said before it, and a setting after `dense` quantizes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from gptq_cli.errors import ConfigError, DeviceMapError
from gptq_cli.fields import INT32, check_choice
from gptq_cli.placement.device_map import check_pattern
from gptq_cli.placement.device_rules import PatternTree

Bits = Literal[2, 3, 4, 8]
ALLOWED_BITS: tuple[int, ...] = get_args(Bits)
DENSE = "dense"
RULES_LIMIT = 1000
_WRITE = "write for example 'model.layers.*.mlp.down_proj=bits:8,group:64', or 'NAME=dense'"
_ALLOWED = "dense, or bits:N, group:N, sym, asym, separated by commas"
MODULE_KEYS = frozenset({"bits", "group", "group_size", "sym", "asym", "dense", "desc_act"})
"""What a table of settings may hold."""
_KEYS = {"bits": "bits", "group": "group_size", "group_size": "group_size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRule:
    """One `--module`: what a pattern covers, and what that gets. None: as for the rest."""

    pattern: str
    """Dotted, with ranges and globs, as in a device map."""
    dense: bool = False
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None

    def __str__(self) -> str:
        said = [
            DENSE if self.dense else "",
            f"bits:{self.bits}" if self.bits is not None else "",
            f"group:{self.group_size}" if self.group_size is not None else "",
            {None: "", True: "sym", False: "asym"}[self.sym],
        ]
        return f"{self.pattern}={','.join(filter(None, said))}"

    def __post_init__(self) -> None:
        if self.pattern in ("", "rest"):
            raise ConfigError(
                f"module {self.pattern!r} is everything; allowed: dotted names with ranges (0-15), globs (*)",
                hint="--bits, --group-size and --sym hold for everything",
            )
        try:
            check_pattern(self.pattern)
        except DeviceMapError as error:
            raise ConfigError(error.message.replace("device map", "module", 1), hint=_WRITE) from error
        if self.bits is not None:
            check_choice(f"module {self.pattern}: bits", self.bits, ALLOWED_BITS)
        group = self.group_size
        if group is not None and (type(group) is not int or (group != -1 and not 0 < group < INT32)):
            raise ConfigError(
                f"module {self.pattern}: group is {group!r}; allowed: -1 (one group per row), "
                "a positive whole number"
            )
        settings = (self.bits, self.group_size, self.sym)
        if self.dense == any(value is not None for value in settings):
            what = "is dense and has settings" if self.dense else "has no settings"
            raise ConfigError(f"module {self.pattern} {what}; allowed: {_ALLOWED}", hint=_WRITE)

    @staticmethod
    def parse(text: str) -> ModuleRule:
        """Read `PATTERN=dense` or `PATTERN=bits:8,group:64,sym`. Raises `ConfigError`."""
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern.strip():
            raise ConfigError(f"module is {text[:80]!r}; allowed: PATTERN={_ALLOWED}", hint=_WRITE)
        return ModuleRule.of(pattern.strip(), value)

    @staticmethod
    def of(pattern: str, value: object) -> ModuleRule:
        """The rule of `pattern` for "bits:8,group:64", or for a mapping of the same. Raises `ConfigError`."""
        if isinstance(value, Mapping):
            pairs = [(str(key), held) for key, held in value.items()]
        elif isinstance(value, str):
            pairs = []
            for part in value.split(","):
                key, colon, held = part.strip().partition(":")
                pairs.append((key.strip(), held.strip() if colon else True))
        else:
            raise ConfigError(f"module {pattern} is {value!r}; allowed: {_ALLOWED}", hint=_WRITE)
        fields: dict[str, bool | int] = {}
        for key, held in pairs:
            name, found = _setting(pattern, key, held)
            if name in fields:
                raise ConfigError(f"module {pattern} has {name} twice", hint="keep one of the two")
            fields[name] = found
        return ModuleRule(pattern=pattern, **fields)  # type: ignore[arg-type]  # `_setting` sorts them


def _setting(pattern: str, key: str, held: object) -> tuple[str, bool | int]:
    """Field and value of one setting."""
    if key == "desc_act":
        raise ConfigError(
            f"module {pattern}: desc_act cannot differ by module: readers take it for all or for none",
            hint="leave it out; static order (--act-order) has its accuracy",
        )
    if key in _KEYS:
        number = held
        if isinstance(held, str) and held.removeprefix("-").isascii() and held.removeprefix("-").isdecimal():
            number = int(held) if len(held) < 12 else held
        if isinstance(number, bool) or not isinstance(number, int):
            allowed = ", ".join(map(str, ALLOWED_BITS)) if key == "bits" else "-1, or a positive whole number"
            raise ConfigError(f"module {pattern}: {key} is {str(held)[:40]!r}; allowed: {allowed}")
        return _KEYS[key], number
    if key in ("sym", "asym", DENSE) and isinstance(held, bool) and (held or key == "sym"):
        return ("sym", held) if key == "sym" else ("sym", False) if key == "asym" else (DENSE, True)
    said = key if held is True else f"{key}:{held}"
    raise ConfigError(f"module {pattern} is {said[:60]!r}; allowed: {_ALLOWED}", hint=_WRITE)


def parse_module_rules(value: object) -> tuple[ModuleRule, ...]:
    """Rules as a person writes them: texts, or a mapping of patterns to settings. Raises `ConfigError`."""
    if isinstance(value, Mapping):
        rules = tuple(ModuleRule.of(str(pattern), held) for pattern, held in value.items())
    elif isinstance(value, str):
        rules = (ModuleRule.parse(value),)
    elif isinstance(value, Iterable):
        rules = tuple(one if isinstance(one, ModuleRule) else ModuleRule.parse(str(one)) for one in value)
    else:
        raise ConfigError(f"modules is {value!r}; allowed: texts, or a mapping of patterns to settings")
    if len(rules) > RULES_LIMIT:
        raise ConfigError(f"there are {len(rules)} settings by module; allowed: {RULES_LIMIT}")
    return rules


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSettings:
    """What the rules make of one name. None: as for the rest."""

    dense: bool = False
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    named: bool = False
    """The last rule that counts names the linear itself, not something above it."""


REST = ModuleSettings()
"""What a name gets that no rule covers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedBefore:
    """What was given to an earlier run, whose budget of bits chose settings that this run took over."""

    modules: tuple[str, ...]
    """Settings by module."""
    quantize_head: bool


def settings_for(rules: tuple[ModuleRule, ...], name: str) -> ModuleSettings:
    """What `rules` make of the linear `name`."""
    if not rules:
        return REST
    return _merged(rules, tuple(sorted(_tree(rules).covering(name))), name.count("."))


@lru_cache(maxsize=64)
def _tree(rules: tuple[ModuleRule, ...]) -> PatternTree:
    tree = PatternTree()
    for number, rule in enumerate(rules):
        tree.add(rule.pattern, number)
    return tree


@lru_cache(maxsize=4096)
def _merged(rules: tuple[ModuleRule, ...], numbers: tuple[int, ...], dots: int) -> ModuleSettings:
    found = REST
    for rule in (rules[number] for number in numbers):
        named = rule.pattern.count(".") == dots
        if rule.dense:
            found = ModuleSettings(dense=True, named=named)
            continue
        found = replace(
            found,
            dense=False,
            bits=found.bits if rule.bits is None else rule.bits,
            group_size=found.group_size if rule.group_size is None else rule.group_size,
            sym=found.sym if rule.sym is None else rule.sym,
            named=named or found.named,
        )
    return found
