"""`--config report.json`: the settings of a run, read as a preset.

Left out is what a report must not decide for the person who reads it, since a report comes along with a
checkpoint from anywhere: whether code of the model's repository may run. Values that are null are not given.

The settings hold the bits that a budget chose, so that the same are written again. Where other bits are asked
for, what was asked for at first counts: `EarlierRun`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, BinaryIO

from gptq_cli.errors import ConfigError
from gptq_cli.results.document import SCHEMA_VERSION

LARGEST_BYTES = 1 << 28
"""Of a report: some hundred bytes for each linear."""
NOT_TAKEN = frozenset({"trust_remote_code"})
_HINT = "give report.json of a checkpoint, or what gptq quantize --json printed; a preset is TOML"


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRun:
    """What a report says of its run besides the settings."""

    head: str | None
    """The output head, where it was quantized."""
    asked: dict[str, Any] | None
    """Settings by module and of the head as they were given, where a budget of bits chose more of them, in
    that run or in one that it ran again."""


def read_settings(where: str, begun: bytes, stream: BinaryIO) -> tuple[dict[str, Any], EarlierRun]:
    """The options in a report that begins with `begun` and goes on in `stream`. Raises `ConfigError`."""
    raw = begun + stream.read(LARGEST_BYTES - len(begun) + 1)
    if len(raw) > LARGEST_BYTES:
        raise ConfigError(f"{where} has more than {LARGEST_BYTES} bytes", hint=_HINT)
    try:
        report = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not a JSON document: {_fault(error)}", hint=_HINT) from error
    settings = report.get("settings") if isinstance(report, dict) else None
    if not isinstance(settings, dict) or not isinstance(report.get("command_line"), list):
        raise ConfigError(f"{where} is not the report of a gptq quantize run", hint=_HINT)
    if report.get("schema_version") != SCHEMA_VERSION or "model" not in settings:
        raise ConfigError(
            f"{where} is the report of another version of gptq: its settings do not hold the whole command",
            hint="its command_line does",
        )
    taken = {name: value for name, value in settings.items() if value is not None and name not in NOT_TAKEN}
    return taken, _earlier(where, report)


def _earlier(where: str, report: dict[str, Any]) -> EarlierRun:
    head, choice = report.get("head"), report.get("bit_choice")
    try:
        name = None if head is None else str(head["name"])
        asked, before = None, report.get("asked_before")
        given, modules = (before, "modules") if choice is None else (choice, "given_modules")
        if given is not None:
            rules = [str(one) for one in given[modules]]
            asked = {"module": rules, "quantize_head": bool(given["quantize_head"])}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where} is not the whole report of a gptq quantize run", hint=_HINT) from error
    return EarlierRun(head=name, asked=asked)


def _fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it cannot be read at line {error.lineno}, column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else "it is not UTF-8"
