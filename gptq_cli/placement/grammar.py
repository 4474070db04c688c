"""Reading the text of a device map: where each key and each value stands, before anyone asks what it means.

The scanners here know commas, equals signs, JSON and TOML, and nothing of devices; they keep the position of
every piece, so that an error can point at the character.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptq_cli.errors import DeviceMapError
from gptq_cli.placement.device import syntax_error
from gptq_cli.wording import json_fault

_FILE_LIMIT_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Pair:
    """A key and a value as found, with their positions in the text where there is one."""

    key: str
    value: object
    key_at: int | None = None
    value_at: int | None = None


@dataclass(frozen=True, slots=True)
class MapFile:
    """What a device-map file holds: pairs, or one text or number (`device_map = "auto"`)."""

    name: str
    content: str
    pairs: tuple[Pair, ...] = ()
    single: object = None


def scan_compact(text: str, what: str, value_name: str) -> Iterator[Pair]:
    """`a=0,b=1` -> pairs with their positions."""
    position = 0
    for part in text.split(","):
        at = position + len(part) - len(part.lstrip())
        position += len(part) + 1
        if not part.strip():
            raise syntax_error(what, text, at, "empty entry", hint="take the extra comma out")
        key, equals, value = part.partition("=")
        value_at = at + len(key.lstrip()) + 1
        if not equals:
            raise syntax_error(
                what,
                text,
                at,
                f"{part.strip()[:60]!r} has no {value_name.lower()}; allowed: NAME={value_name}",
            )
        if not key.strip():
            raise syntax_error(
                what, text, at, "name missing before '='", hint=f"write rest={value.strip()[:20]}"
            )
        if "=" in value:
            raise syntax_error(
                what,
                text,
                value_at + value.index("="),
                "second '=' in one entry",
                hint="part entries by commas",
            )
        value_at += len(value) - len(value.lstrip())
        if not value.strip():
            raise syntax_error(what, text, value_at, f"value missing after {key.strip()[:60]!r}=")
        yield Pair(key.lstrip(), value.strip(), at, value_at)


def scan_json_object(text: str, start: int) -> Iterator[Pair]:
    """Walk one flat JSON object and keep the position of each key and value."""
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    def decode(at: int, wanted: str) -> tuple[object, int]:
        try:
            found, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise syntax_error(
                "device map",
                text,
                error.pos,
                f"not valid JSON: {json_fault(error).lower()}; expected {wanted}",
            ) from None
        except (ValueError, RecursionError):
            raise syntax_error("device map", text, at, f"not valid JSON; expected {wanted}") from None
        return found, end

    if text[start] != "{":
        raise syntax_error(
            "device map",
            text,
            start,
            'JSON that is not an object; allowed: {"NAME": DEVICE, …}',
            hint='write for example {"model.layers.0": 0, "": "cpu"}',
        )
    at = skip(start + 1)
    while at >= len(text) or text[at] != "}":
        key, end = decode(at, "a module name in double quotes")
        if not isinstance(key, str):
            raise syntax_error("device map", text, at, "a module name must be text in double quotes")
        colon = skip(end)
        if colon >= len(text) or text[colon] != ":":
            raise syntax_error("device map", text, colon, f"':' expected after {key[:60]!r}")
        value_at = skip(colon + 1)
        value, end = decode(value_at, "a device")
        yield Pair(key, value, at, value_at)
        at = skip(end)
        if at < len(text) and text[at] == ",":
            at = skip(at + 1)
            if at < len(text) and text[at] == "}":
                raise syntax_error("device map", text, at, "a module name expected after ','")
        elif at >= len(text) or text[at] != "}":
            raise syntax_error("device map", text, at, "',' or '}' expected")
    rest = skip(at + 1)
    if rest < len(text):
        raise syntax_error("device map", text, rest, "unexpected text after the JSON object")


def read_map_file(spec: str) -> MapFile:
    """`@file.json` or `@file.toml`. TOML may be flat, nested by dots, or hold the map under `device_map`."""
    at = spec.index("@") + 1
    name = spec.strip()[1:]

    def refuse(message: str, hint: str | None = None) -> DeviceMapError:
        return syntax_error("device map", spec, at, message, hint=hint)

    if not name:
        raise refuse("file name missing after '@'; allowed: @FILE.json or @FILE.toml")
    path = Path(name)
    if path.suffix not in (".json", ".toml"):
        raise refuse(f"{name[-60:]!r} is not a device-map file; allowed: a name that ends in .json or .toml")
    try:
        if not path.is_file():
            raise refuse(f"no such file: {name[-200:]!r}", "give a path from the current directory")
        if path.stat().st_size > _FILE_LIMIT_BYTES:
            raise refuse(f"{name[-200:]!r} is larger than {_FILE_LIMIT_BYTES} bytes")
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise refuse(f"cannot read {name[-200:]!r}: {reason[:100]}") from None
    if path.suffix == ".toml":
        return _read_toml(name, content)
    start = len(content) - len(content.lstrip())
    if start == len(content):
        raise DeviceMapError(f'{name[-200:]}: device map is empty; allowed: {{"NAME": DEVICE, …}}')
    try:
        return MapFile(name, content, tuple(scan_json_object(content, start)))
    except DeviceMapError as error:
        raise in_file(name, error) from None


def in_file(name: str, error: DeviceMapError) -> DeviceMapError:
    """The same error, opened by the name of the file it was found in."""
    return DeviceMapError(f"{name[-200:]}: {error.message}", hint=error.hint, position=error.position)


def _read_toml(name: str, content: str) -> MapFile:
    try:
        table = tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        raise DeviceMapError(f"{name[-200:]}: device map: not valid TOML: {str(error)[:200]}") from None
    if set(table) == {"device_map"}:
        inner = table["device_map"]
        if not isinstance(inner, dict):
            return MapFile(name, content, single=inner)
        table = inner
    pairs: list[Pair] = []

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            pairs.append(Pair(prefix, value))

    try:
        walk("", table)
    except RecursionError:
        raise DeviceMapError(f"{name[-200:]}: device map: nested too deeply to be read") from None
    return MapFile(name, content, tuple(pairs))
