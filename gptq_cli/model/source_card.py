"""The card of a dense model: what its README.md says about licence, language and purpose.

The file is written by others: only short texts of known fields are taken from its front matter, whatever else
it holds.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there

from gptq_cli.model.source_files import open_regular, outside_target
from gptq_cli.results.card import CARD, SourceCard

_LARGEST_BYTES = 1 << 20
_FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_LONGEST, _MOST = 256, 64
_HUB_CACHE = re.compile(r"models--(.+)")
_OF_A_FORM = frozenset({"gguf", "awq", "gptq", "exl2", "fp8", "mlx", "bitsandbytes", "4-bit", "8-bit"})
"""Tags about how weights are stored, which are not those of a quantization of it."""


def read_source_card(directory: Path) -> SourceCard:
    """What README.md in `directory` says; nothing where there is none.

    Raises `ValueError`, with a clause that says why, for a file that cannot be read.
    """
    if outside_target(directory, CARD) is not None:
        raise ValueError("it is a link that leads out of the model's directory")
    try:
        with open_regular(directory / CARD) as file:
            raw = file.read(_LARGEST_BYTES)
    except FileNotFoundError:
        return SourceCard()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    front = _FRONT.match(raw.decode("utf-8", errors="replace"))
    if front is None:
        return SourceCard()
    try:
        held = yaml.safe_load(front[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(
            f"its front matter is not YAML: {' '.join(str(error).split())[:_LONGEST]}"
        ) from error
    if not isinstance(held, dict):
        return SourceCard()
    return SourceCard(
        license=_word(held.get("license")),
        license_name=_word(held.get("license_name")),
        license_link=_word(held.get("license_link")),
        pipeline_tag=_word(held.get("pipeline_tag")),
        language=_words(held.get("language")),
        tags=tuple(tag for tag in _words(held.get("tags")) if tag.lower() not in _OF_A_FORM),
    )


def _word(value: object) -> str:
    """A short text of one line, or of a list of one; "" for anything else."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or len(value) > _LONGEST:
        return ""
    return value.strip() if value.isprintable() else ""


def _words(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(word for item in items[:_MOST] if (word := _word(item))))


def base_model_of(source: str, directory: Path) -> str:
    """The Hub id of a model that was given as `source` and lies in `directory`.

    That of a snapshot in the Hub's cache; otherwise the name of a local directory, never its path. "" where
    that is not a name that the Hub allows.
    """
    real = directory.resolve()
    cached = _HUB_CACHE.fullmatch(real.parent.parent.name) if real.parent.name == "snapshots" else None
    name = cached[1].replace("--", "/") if cached is not None else source
    if cached is None and Path(source).exists():
        name = real.name
    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    return name
