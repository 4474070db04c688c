"""`--config w4g128` or `--config FILE.toml`: a preset holds options under their long names, with `_` or `-`.

    bits = 4
    group_size = 128                                         or "auto"
    device_map = { "model.embed_tokens" = 0, rest = 1 }      a table where the option takes NAME=VALUE,…
    max_memory = { 0 = "20GiB", cpu = "48GiB" }
    [modules]                                                settings by module, --module on the command line
    "model.layers.*.mlp.down_proj" = "bits:8,group:64"       or a table: { bits = 8, group = 64 }

`--config report.json` takes the settings of a run in place of a preset: see `cli.run_again`.

Flags and GPTQ_* variables override it. A preset may serve all commands: options of another command are
skipped, unknown ones are an error. Paths in it are relative to the working directory. Those in
`gptq_cli/presets/` are found by name; a file of the same name is found as `./w4g128`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import tomllib
from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from gptq_cli.cli.run_again import EarlierRun, read_settings
from gptq_cli.errors import ConfigError
from gptq_cli.fields import nearest
from gptq_cli.files import open_once, reason, shown
from gptq_cli.module_settings import MODULE_KEYS, ModuleRule

TABLES = ("device_map", "max_memory", "devices")
"""Options that a preset may write as a table."""
WORD_OR_NUMBER: dict[str, str] = {"group_size": "auto"}
"""Options that a preset may write as a whole number, or as this word."""
LARGEST_BYTES = 1 << 20
DEEPEST = 8
"""Levels of tables and lists in a preset."""
SHIPPED = Path(__file__).parent.parent / "presets"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What a name looks like; a path has a dot or a slash somewhere."""
_LONG_KEY = re.compile(rb"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""")
"""A key of so many parts that `tomllib`, whose time grows with their square, would take minutes to say no."""
_PLACE = re.compile(r"\(at line (\d+), column (\d+)\)")
_TOML_HINT = "a line is NAME = VALUE; texts stand in quotes, flags are true or false"
_TOML_WORDS = (
    ("Cannot", "the name was given before"),
    ("Duplicate", "the name was given before"),
    ("Expected '=' after a key", "there is no = after the name"),
    ("Invalid value", "this is not a value"),
    ("Expected newline", "something follows the value"),
    ("Unclosed", "a bracket is not closed"),
    ("Unterminated", "a quotation mark is missing"),
    ('Expected "\'"', "a quotation mark is missing"),
    ("Illegal character", "a quotation mark is missing, or a control character is in a text"),
)
"""Beginnings of what `tomllib` says, and our words for it; what it says otherwise is about rare forms."""
NOT_IN_PRESETS = ("config", "explain")
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
}


@dataclass(frozen=True, slots=True)
class Option:
    """An option as a preset sees it: the parameter that it fills, and the type of that."""

    parameter: str
    kind: Any


@dataclass(frozen=True, slots=True)
class Preset:
    """Values of options by their long names with `_`."""

    values: dict[str, object]
    earlier: EarlierRun | None
    """The run that they are the settings of; None: they were written by a person."""


_EARLIER = "gptq_cli.earlier_run"


def use_preset(context: typer.Context, value: str | None) -> str | None:
    """Callback of `--config`: make the preset's values the defaults of this invocation."""
    if value is not None and not context.resilient_parsing:
        own = options_of(context.command)
        group = context.parent.command if context.parent else context.command
        known = dict(own)
        for command in getattr(group, "commands", {}).values():
            known = options_of(command) | known
        preset = read_preset(find_preset(value), known)
        context.default_map = {own[key].parameter: held for key, held in preset.values.items() if key in own}
        context.meta[_EARLIER] = preset.earlier
    return value


def earlier_run(context: typer.Context) -> EarlierRun | None:
    """The run whose report `--config` is; None where it is a preset, or not given."""
    found: EarlierRun | None = context.meta.get(_EARLIER)
    return found


def shipped_presets() -> dict[str, Path]:
    """The presets that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def find_preset(value: str) -> Path:
    """The shipped preset called `value`, or else `value` as a path. Raises `ConfigError` for neither."""
    shipped = shipped_presets()
    if value in shipped:
        return shipped[value]
    if _NAME.fullmatch(value) is None or os.path.exists(value):
        return Path(value)
    near = nearest(value, list(shipped))
    raise ConfigError(
        f"preset {shown(value)!r} is not found; available: {', '.join(shipped)}, or the path of a file",
        hint=f"did you mean --config {near}?" if near else None,
    )


def options_of(command: Any) -> dict[str, Option]:
    """The options of a Typer command by their long name with `_`, those of `NOT_IN_PRESETS` left out."""
    kinds = get_type_hints(inspect.unwrap(command.callback))
    options = {}
    for parameter in command.params:
        long_name = next((name for name in parameter.opts if name.startswith("--")), parameter.name)
        key = long_name.removeprefix("--").replace("-", "_")
        if parameter.name in kinds and key not in NOT_IN_PRESETS:
            options[key] = Option(parameter.name, kinds[parameter.name])
    return options


def read_preset(path: Path, options: Mapping[str, Option]) -> Preset:
    """The preset at `path`, its values checked against `options`. Raises `ConfigError`."""
    table, earlier = _table(path)
    values: dict[str, object] = {}
    for key, held in table.items():
        name = key.replace("-", "_")
        if name == "modules" and "module" in options:
            name, held = "module", _module_rules(path, held)
        if name not in options:
            section = "keys stand at the top, not in a section" if isinstance(held, dict) else None
            hint = section or did_you_mean(key, options)
            raise ConfigError(f"preset {str(path)!r} has the unknown key {shown(key)!r}", hint=hint)
        if name in values:
            raise ConfigError(f"preset {str(path)!r} has {name!r} twice, with '-' and with '_'")
        values[name] = _checked(path, key, held, options[name].kind)
    return Preset(values, earlier)


def _table(path: Path) -> tuple[dict[str, Any], EarlierRun | None]:
    """The TOML at `path` (a file, or a pipe that is read once), small and flat as a preset is; where it is
    the report of a run, its settings, and what else counts of that run."""
    where = f"preset {shown(path)!r}"
    try:
        with open_once(path) as stream:
            raw = stream.read(LARGEST_BYTES + 1)
            if raw.lstrip()[:1] == b"{":
                return read_settings(where, raw, stream)
    except OSError as error:
        shipped = path.stem in shipped_presets() and isinstance(error, FileNotFoundError)
        hint = f"did you mean --config {path.stem}, which comes with gptq?" if shipped else None
        raise ConfigError(f"{where} cannot be read: {reason(error)}", hint=hint) from error
    if len(raw) > LARGEST_BYTES:
        raise ConfigError(f"{where} has more than {LARGEST_BYTES} bytes; a preset holds a few options")
    if _LONG_KEY.search(raw):
        raise ConfigError(f"{where} is nested too deeply; allowed: {DEEPEST} levels")
    try:
        table = tomllib.loads(raw.removeprefix(BOM_UTF8).decode("utf-8"))
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply; allowed: {DEEPEST} levels") from error
    except ValueError as error:  # not TOML, not UTF-8, a number of thousands of digits
        raise ConfigError(f"{where} is not valid TOML: {_toml_words(raw, error)}", hint=_TOML_HINT) from error
    level: list[Any] = [table]
    for _ in range(DEEPEST + 1):
        level = [item for held in level for item in _inside(held)]
    if level:
        raise ConfigError(f"{where} is nested too deeply; allowed: {DEEPEST} levels")
    return table, None


def _toml_words(raw: bytes, error: ValueError) -> str:
    """What is wrong with a TOML text: where, what stands there, and why if `tomllib` says so."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
    found = _PLACE.search(str(error))
    why = next((words for begin, words in _TOML_WORDS if str(error).startswith(begin)), "")
    lines = raw.removeprefix(BOM_UTF8).decode("utf-8").splitlines() or [""]
    if "(at end of document)" in str(error):
        last = next((line for line in reversed(lines) if line.strip()), "").strip()
        return f"the last line, {shown(last)!r}: {why or 'it ends too early'}"
    if found is None:
        return why or "a value cannot be read"
    text = lines[min(int(found[1]), len(lines)) - 1].strip()
    place = f"line {found[1]}, column {found[2]} of {shown(text)!r}"
    return f"{place}: {why or 'this cannot be read'}"


def _inside(held: Any) -> list[Any]:
    if isinstance(held, dict):
        return list(held.values())
    return held if isinstance(held, list) else []


def did_you_mean(key: str, options: Mapping[str, object]) -> str:
    """The nearest options, or all of them."""
    near = difflib.get_close_matches(key.replace("-", "_"), options, n=2, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"allowed keys: {', '.join(sorted(options))}"


def _checked(path: Path, key: str, held: object, hint: Any) -> object:
    name = key.replace("-", "_")
    if isinstance(held, dict) and name in TABLES:
        return _flat(name, held)
    if name in WORD_OR_NUMBER:
        hint = int | Literal[WORD_OR_NUMBER[name]]  # the command takes it as text
    kinds = [kind for kind in _alternatives(hint) if kind is not NoneType]
    repeated = next((kind for kind in kinds if get_origin(kind) is list), None)
    if repeated is not None:
        items = held if isinstance(held, list) else [held]
        return [_checked(path, key, item, get_args(repeated)[0]) for item in items]
    literals = [kind for kind in kinds if not isinstance(kind, type)]
    fits = any(
        type(held) is kind or (kind is float and type(held) is int)
        for kind in kinds
        if isinstance(kind, type)
    )
    if fits or held in literals:
        return held
    listed = [repr(item) for item in literals] + [_KINDS[kind] for kind in kinds if kind in _KINDS]
    if name in TABLES:
        listed.append("a table of names and values")
    found = shown(json.dumps(held, default=str))
    raise ConfigError(f"preset {str(path)!r}: {key} is {found}; allowed: {', '.join(listed)}")


def _module_rules(path: Path, held: object) -> object:
    """The table [modules] as texts of --module; nested tables are joined by dots, as in a device map."""
    if not isinstance(held, dict):
        return held
    found: list[str] = []

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict) and not (prefix and value.keys() <= MODULE_KEYS):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
            return
        try:
            found.append(str(ModuleRule.of(prefix, value)))
        except ConfigError as error:
            raise ConfigError(f"preset {str(path)!r}: {error.message}", hint=error.hint) from error

    walk("", held)
    return found


def _alternatives(hint: Any) -> list[Any]:
    """`int | None` -> [int, NoneType]; `Literal["a", "b"]` -> ["a", "b"]."""
    origin = get_origin(hint)
    if origin in (UnionType, Union):
        return [kind for item in get_args(hint) for kind in _alternatives(item)]
    return list(get_args(hint)) if origin is Literal else [hint]


def _flat(name: str, table: Mapping[str, object]) -> str:
    """A table as the text that the option takes."""
    if name == "device_map":
        return json.dumps(table)
    return ",".join(f"{key}={held}" for key, held in table.items())
