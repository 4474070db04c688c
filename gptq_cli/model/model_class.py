"""Which class opens a model: its own, so that nothing of the model is left out.

config.json names the class that the model was saved with. A causal language model is opened through
`AutoModelForCausalLM`, a model with other towers beside its text decoder (images, video, sound) with the
class that holds all of them. Which classes generate text is what Transformers' own tables say; a type that
has both is opened with the larger one, unless the config names the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import modeling_auto

_WITH_TOWERS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
"""Transformers' tables of classes that generate text from more than text; encoder-decoders stand in the last
two as well, and are refused by their config."""
_REMOTE = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def causal_names(model_type: str) -> frozenset[str]:
    """Names of the classes that `AutoModelForCausalLM` opens for a model type."""
    return frozenset(_listed("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", model_type))


def names_with_towers(model_type: str) -> tuple[str, ...]:
    """Names of the classes of a model type that generate text from more than text."""
    names = [name for table in _WITH_TOWERS for name in _listed(table, model_type)]
    return tuple(name for name in dict.fromkeys(names) if name not in causal_names(model_type))


_PURPOSES = (
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "text-generation"),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "image-text-to-text"),
    ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "any-to-any"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "automatic-speech-recognition"),
)
"""Transformers' tables, and what the Hub calls the purpose (pipeline_tag) of the classes in them."""


def purpose_of(model: Any) -> str:
    """The Hub's word for what `model` does: that of the first table that holds its class."""
    kind, name = model.config.model_type, type(model).__name__
    found = (tag for table, tag in _PURPOSES if name in _listed(table, kind))
    return next(found, "text-generation")


def known_types() -> frozenset[str]:
    """Every model type that Transformers has a generating class for, in its own code."""
    tables = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", *_WITH_TOWERS)
    return frozenset(kind for table in tables for kind in getattr(modeling_auto, table, {}))


def remote_class(auto_map: Mapping[str, Any]) -> Any:
    """The auto class that opens the model by code of its repository, None where it names none."""
    for name in _REMOTE:
        if name in auto_map:
            return getattr(transformers, name, None)
    return None


def own_class(config: Any, *, trust_remote_code: bool) -> Any:
    """The class, or auto class, that opens the model of `config`.

    `config` is known to be a generating model's (`architecture.load_config`).
    """
    if trust_remote_code:
        remote = remote_class(getattr(config, "auto_map", None) or {})
        if remote is not None:
            return remote
    model_type = config.model_type
    declared = [str(name) for name in getattr(config, "architectures", None) or ()]
    causal, others = causal_names(model_type), names_with_towers(model_type)
    if any(name in causal for name in declared) or not others:
        return AutoModelForCausalLM
    return getattr(transformers, next((name for name in declared if name in others), others[0]))


def generates(kind: Any) -> bool:
    """Whether a class, or auto class, generates text; a robot's policy does not."""
    return kind.__name__ in _REMOTE or bool(kind.can_generate())


def make_model(config: Any, dtype: Any, *, trust_remote_code: bool) -> Any:
    """An instance of the model's own class; call it inside `torch.device("meta")`."""
    kind = own_class(config, trust_remote_code=trust_remote_code)
    if kind.__name__ in _REMOTE:
        return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return kind._from_config(config, dtype=dtype)


def load_model(config: Any, directory: Path, *, trust_remote_code: bool, **options: Any) -> Any:
    """What the model's own class reads from `directory`: the result of its `from_pretrained`."""
    kind = own_class(config, trust_remote_code=trust_remote_code)
    if kind.__name__ in _REMOTE:
        config = copy.deepcopy(config)
        return kind.from_pretrained(directory, config=config, trust_remote_code=trust_remote_code, **options)
    # not the class's own version: that of Qwen2.5-Omni also opens a pickle with the speakers' voices
    load = PreTrainedModel.from_pretrained.__func__
    return load(kind, directory, config=copy.deepcopy(config), **options)


def _listed(table: str, model_type: str) -> Iterator[str]:
    found = getattr(modeling_auto, table, {}).get(model_type, ())
    yield from (found,) if isinstance(found, str) else found
