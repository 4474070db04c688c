"""Chat templates of processors: where a model of images and text keeps one that its tokenizer does not have.

Transformers reads a processor's template from `chat_template.json` (older models) or from
`processor_config.json`; opening the processor itself would need the packages of its image processor.
`chat_template.jinja` is read by the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_cli.errors import ModelError
from gptq_cli.model.source import read_json

_FILES = ("chat_template.json", "processor_config.json")
_KEY = "chat_template"
_LIMIT_BYTES = 10_000_000


def processor_template(folder: Path) -> str | dict[str, str] | None:
    """The template of the processor in `folder`, or its templates by name; None where it has none.

    Raises `ModelError` where a file that should hold one cannot be read.
    """
    for name in _FILES:
        if not (folder / name).is_file():
            continue
        try:
            content = read_json(folder / name, limit_bytes=_LIMIT_BYTES)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{name} of {folder} cannot be read: {error}",
                hint="fetch it again, or remove it: the model then has no chat template",
            ) from error
        found = _template(content.get(_KEY) if isinstance(content, Mapping) else None)
        if found is not None:
            return found
    return None


def _template(value: Any) -> str | dict[str, str] | None:
    """A text; or a list of `{"name": …, "template": …}`, as Transformers writes several."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list):
        pairs = {item.get("name"): item.get("template") for item in value if isinstance(item, Mapping)}
        value = pairs
    if isinstance(value, Mapping):
        named = {n: t for n, t in value.items() if isinstance(n, str) and isinstance(t, str)}
        return named or None
    return None
