"""What the configs of a checkpoint say about how its tensors are packed, without a look at the tensors.

The dictionary stands in quantize_config.json, in quant_config.json, in config.json, or in several of them,
which must not contradict each other. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gptq_cli.checkpoint.format import CheckpointFormat, parse_quantization
from gptq_cli.errors import CheckpointError
from gptq_cli.files import shown, unreadable
from gptq_cli.model.find import local_directory
from gptq_cli.model.source import holds_codes, read_json
from gptq_cli.model.source_files import content_elsewhere
from gptq_cli.wording import as_json

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
_FORMAT_KEYS = ("checkpoint_format", "format")
_AGREE = (
    *("bits", "group_size", "sym", "desc_act", "checkpoint_format"),
    *("dynamic", "quant_method", "pack_dtype", "is_marlin_format"),
)
"""Keys that must agree in all files: those that decide how tensors are read."""
_INNER_CONFIGS = 2
"""How deep to look for configs inside config.json: thinker_config has a text_config."""
_ANY = MappingProxyType({"bits": 4, "group_size": 128})
"""Replaces keys that a dictionary leaves to another one."""


def checkpoint_directory(path: str | Path) -> Path:
    """The directory `path`. Raises `CheckpointError` where there is none, or it cannot be opened."""
    directory = local_directory(path, CheckpointError)
    if directory is None:
        raise CheckpointError(
            f"no such directory: {shown(path)}", hint="give the directory that `gptq quantize --out` wrote"
        )
    return directory


def read_formats(directory: Path) -> tuple[Mapping[str, Any], CheckpointFormat]:
    """The quantization dictionary, merged from all files that hold one; they must not contradict each
    other."""
    found = _quantization_dicts(directory)
    if not found and any(holds_codes(path) for path in directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{directory} has packed tensors, but neither a quantize_config.json nor a quantization_config "
            "in config.json says how to read them",
            hint="fetch the quantize_config.json that was published with them",
        )
    if not found:
        raise CheckpointError(
            f"{directory} is not a GPTQ checkpoint: there is neither a quantize_config.json nor a "
            "quantization_config in config.json",
            hint="quantize the model first: gptq quantize MODEL --out DIR",
        )
    _agree(found)
    (first, merged), *others = found
    for _, other in others:
        merged = _completed(merged, other)
    dynamic_in = next((name for name, content in found if content.get("dynamic")), first)
    return merged, parse_quantization(merged, first, dynamic_in)


def _quantization_dicts(directory: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(where it was found, dictionary), the file that decides first."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name in (*CONFIG_FILES, "config.json"):
        if not (directory / name).is_file():
            continue
        try:
            content = read_json(directory / name)
        except (OSError, ValueError) as error:
            other = content_elsewhere(directory / name)
            if other is not None:
                raise CheckpointError(f"{name} in {directory} {other[0]}", hint=other[1]) from error
            if isinstance(error, OSError):
                message, hint = unreadable(f"{directory}: {name}", directory / name, error)
                raise CheckpointError(message, hint=hint or None) from error
            raise CheckpointError(f"{directory}: {error}") from error
        if name == "config.json" and isinstance(content, Mapping):
            found += list(_inside_config(content, name))
        else:
            found.append((name, content))
    for where, held in found:
        if not isinstance(held, Mapping):
            raise CheckpointError(f"{directory}: the quantization config in {where} is not a JSON object")
        if held and not any(key in held for key in (*_AGREE, *_FORMAT_KEYS)):
            raise CheckpointError(
                f"{directory}: the quantization config in {where} has none of {', '.join(_AGREE[:5])}",
                hint="it is not a quantization config: remove the file, or replace it by the right one",
            )
    return found


def _inside_config(
    config: Mapping[str, Any], where: str, depth: int = _INNER_CONFIGS
) -> Iterator[tuple[str, Any]]:
    """The quantization_config of config.json and of the configs inside it: some tools write it into the text
    part (text_config) of a text-and-image model."""
    if config.get("quantization_config") is not None:
        yield where, config["quantization_config"]
    for key, inner in config.items() if depth else ():
        if key != "quantization_config" and isinstance(inner, Mapping):
            yield from _inside_config(inner, f"{where}: {key}", depth - 1)


def _agree(found: list[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise `CheckpointError` where two dictionaries contradict each other; a key that is missing or null in
    one of them is not a contradiction."""
    said: dict[str, tuple[str, Any]] = {}
    for where, content in found:
        own = dict(content)
        parse_quantization({**_ANY, **{key: own[key] for key in own if own[key] is not None}}, where)
        if own.get("checkpoint_format") is None:
            own["checkpoint_format"] = own.get("format")
        for key in _AGREE:
            value = own.get(key)
            if value is None or value == {}:
                continue
            first, before = said.setdefault(key, (where, value))
            if before != value:
                raise CheckpointError(
                    f"{key} is {as_json(before)} in {first} but {as_json(value)} in {where}",
                    hint="compare what the checkpoint was published with, and set both to what is right",
                )


def _completed(content: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`content`, completed with keys from `other`."""
    rest = {key: value for key, value in other.items() if value is not None}
    if any(content.get(key) is not None for key in _FORMAT_KEYS):
        rest = {key: value for key, value in rest.items() if key not in _FORMAT_KEYS}
    own = {key: value for key, value in content.items() if value is not None or key not in rest}
    if own.get("dynamic") == {}:
        own["dynamic"] = rest.get("dynamic", {})
    return {**rest, **own}
