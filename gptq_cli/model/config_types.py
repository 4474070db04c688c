"""The types of values in config.json, checked before any of them is used.

Transformers checks most numbers when it builds the config object. Fields that are read before that, or only
by us, are checked here, so that `"architectures": 5` is an error that names the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from gptq_cli.errors import ModelError
from gptq_cli.wording import as_json

Check = Callable[[Any], bool]
COMPARE = "compare config.json with the one that the model was published with"
"""The hint where a value cannot be right."""


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool)


FIELDS: Mapping[str, tuple[Check, str]] = MappingProxyType(
    {
        "architectures": (_texts, "a list of texts"),
        "attention_chunk_size": (_count, "a whole number"),
        "auto_map": (_object, "an object"),
        "dtype": (_text, "a text"),
        "hidden_size": (_count, "a whole number"),
        "is_decoder": (_truth, "true, false"),
        "is_encoder_decoder": (_truth, "true, false"),
        "max_position_embeddings": (_count, "a whole number"),
        "model_type": (_text, "a text"),
        "num_attention_heads": (_count, "a whole number"),
        "quantization_config": (_object, "an object"),
        "sliding_window": (_count, "a whole number"),
        "text_config": (_object, "an object"),
        "tie_word_embeddings": (_truth, "true, false"),
        "torch_dtype": (_text, "a text"),
        "vocab_size": (_count, "a whole number"),
    }
)
"""Field -> whether a value has its type, and the type in words. null always means "not given"."""


def check_types(source: str, raw: Mapping[str, Any]) -> None:
    """Raise `ModelError` for the first field of config.json, or of its text_config, with a value of another
    type."""
    parts = [("", raw)]
    if isinstance(raw.get("text_config"), Mapping):
        parts.append(("text_config.", raw["text_config"]))
    for prefix, part in parts:
        for name, (fits, kind) in FIELDS.items():
            value = part.get(name)
            if value is not None and not fits(value):
                raise ModelError(
                    f"{source}: config.json says {prefix}{name} = {as_json(value, 80)}; allowed: {kind}",
                    hint=COMPARE,
                )
