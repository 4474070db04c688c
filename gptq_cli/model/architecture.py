"""Whether a config.json describes a model with a text decoder, decided before anything is built.

That is a causal language model, alone or beside other towers (images, sound). Errors say what else it is: an
encoder, an encoder-decoder or a vision model. Python code from a model's
repository is not run without permission.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from gptq_cli.config import ModelRef
from gptq_cli.errors import GptqError, ModelError
from gptq_cli.files import unreadable
from gptq_cli.model.config_types import COMPARE, check_types
from gptq_cli.model.headers import brief
from gptq_cli.model.model_class import (
    causal_names,
    generates,
    known_types,
    names_with_towers,
    own_class,
    remote_class,
)
from gptq_cli.model.source import ModelFiles, read_json
from gptq_cli.wording import first_line, number_of

COUNT_LIMIT = 100_000
"""Experts, heads, labels, entries of a list: the largest numbers in published models are below 1,000, and
ImageNet's 21,843 labels are the longest list."""
_LAYERS_LIMIT = 2_000
"""Layers; the deepest published models have fewer than 200."""
_LAYERS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers"})
"""Each of these layers has a tensor of its own."""
_COUNTS = re.compile(
    r"^(?:num|n|number_of)_(?!param|token|train|step|epoch|sample|ctx|pos|inner|vocab|flop|bucket|hash|codev)"
    r"(?!em?bd|embed|channel|feature|pixel|patch|image|frame)"
    r"|layers?$|blocks?$|depths?$|labels|experts|heads?$|stages?$|groups?$|codebooks?$|quantizers?$"
)
"""Config fields whose value becomes a number of objects."""
_ENDLESS = 1 << 63
_KEY_SHOWN = 80
_PLAIN_ANSWERS: Mapping[str, bool] = MappingProxyType(
    {
        "return_dict": True,
        "output_attentions": False,
        "output_hidden_states": False,
        "output_router_logits": False,
    }
)
"""Fields that say what a forward gives back beside the logits, and in which form. They are left from
training, and a reader asks for what it needs: logits alone, by their name."""
_CONFIG_LIMIT_BYTES = 10_000_000


def raw_config(files: ModelFiles) -> Mapping[str, Any]:
    """config.json, parsed. Raises `ModelError`."""
    path = files.directory / "config.json"
    try:
        raw = read_json(path, limit_bytes=_CONFIG_LIMIT_BYTES)
    except OSError as error:
        message, hint = unreadable(f"{files.source}: config.json", path, error)
        raise ModelError(message, hint=hint or None) from error
    except ValueError as error:
        raise ModelError(f"{files.source}: config.json cannot be read: {error}") from error
    if not isinstance(raw, Mapping):
        raise ModelError(f"{files.source}: config.json is not a JSON object")
    check_types(files.source, raw)
    return raw


def load_config(files: ModelFiles, ref: ModelRef) -> Any:
    """The model's config object, checked to have a text decoder. Raises `ModelError`."""
    raw = raw_config(files)
    if raw.get("auto_map") and not ref.trust_remote_code and raw.get("model_type") not in known_types():
        raise ModelError(
            f"{files.source} (model_type {raw.get('model_type')!r}) needs Python code from its repository",
            hint="read that code, then add --trust-remote-code",
        )
    if "transformers_weights" in raw:
        raise ModelError(f"{files.source}: config.json refers to other weight files (transformers_weights)")
    if "model_type" not in raw:
        raise ModelError(f"{files.source}: config.json has no model_type, so its architecture is unknown")
    check_counts(files, raw)
    try:
        config = AutoConfig.from_pretrained(
            files.directory, trust_remote_code=ref.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise_import_failure(error)
        wrong = _no_dtype(raw)
        if wrong is not None:
            raise ModelError(
                f"{files.source}: config.json says {wrong[0]} = {brief(wrong[1])}; "
                "allowed: float16, bfloat16, float32",
                hint=COMPARE,
            ) from error
        unknown = "does not recognize this architecture" in str(error)
        raise ModelError(
            f"{files.source}: config.json cannot be used: {first_line(error)}",
            hint="a newer transformers may know this architecture: pip install -U transformers"
            if unknown
            else COMPARE,
        ) from error
    _check_architecture(files.source, raw, config)
    _answer_plainly(config)
    return config


def _answer_plainly(config: Any) -> None:
    """Switch off what `_PLAIN_ANSWERS` names, in the config and in those inside it. The files are not
    changed."""
    for name, plain in _PLAIN_ANSWERS.items():
        if getattr(config, name, plain) != plain:
            setattr(config, name, plain)
    for inner in vars(config).values():
        if isinstance(inner, PretrainedConfig):
            _answer_plainly(inner)


def _no_dtype(config: Mapping[str, Any], inside: str = "") -> tuple[str, object] | None:
    """The first field for a dtype whose value names none, and that value."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            found = _no_dtype(value, f"{inside}{key}.") if not inside.count(".") else None
            if found is not None:
                return found
        elif key in ("dtype", "torch_dtype") and value not in (None, "auto"):
            name = value.removeprefix("torch.") if isinstance(value, str) else ""
            if not isinstance(getattr(torch, name, None), torch.dtype):
                return f"{inside}{key}", value
    return None


def check_counts(files: ModelFiles, raw: Mapping[str, Any]) -> None:
    """Refuse a config that asks for more layers, experts or labels than a model of these files can have.

    A config class makes lists of such lengths, and a model as many modules: a billion of them would fill the
    memory before anything could be compared with the files. Raises `ModelError`.
    """
    layers = min(len(files.tensors) or _LAYERS_LIMIT, _LAYERS_LIMIT)
    for name, count in _counts(raw):
        word = name.rpartition(".")[2]
        if word in _LAYERS and count > layers:
            known = 0 < len(files.tensors) <= _LAYERS_LIMIT
            reason = (
                f"but the files hold {number_of(len(files.tensors), 'tensor')}"
                if known
                else f"allowed: up to {layers}"
            )
            raise ModelError(
                f"{files.source}: config.json asks for {brief(count)} layers ({name}), {reason}",
                hint=COMPARE,
            )
        if count > COUNT_LIMIT:
            raise ModelError(
                f"{files.source}: config.json says {name} = {brief(count)}; allowed: up to {COUNT_LIMIT}",
                hint=COMPARE,
            )


def _counts(raw: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(dotted name, number) of every field that is a count, and the length of every list or dictionary, at
    any depth."""
    waiting: list[tuple[str, object]] = [("", raw)]
    while waiting:
        path, value = waiting.pop()
        word = path.rpartition(".")[2]
        if isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) and _COUNTS.search(word):
            yield path, int(value) if math.isfinite(value) else _ENDLESS
        elif isinstance(value, Mapping):
            if path:
                yield f"len({path})", len(value)
            waiting += [
                (f"{path}.{key}" if path else str(key)[:_KEY_SHOWN], item) for key, item in value.items()
            ]
        elif isinstance(value, list):
            yield f"len({path})", len(value)
            waiting += [(path, item) for item in value]


def raise_import_failure(error: BaseException) -> None:
    """Raise `GptqError` where `error` is caused by a package that cannot be imported, and not by the
    model."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__
    if cause is not None:
        raise GptqError(
            f"a package that the model needs cannot be imported: {first_line(cause)}",
            hint="install the named package; if it is part of torch or transformers, their versions do not "
            "match: pip install -U torch transformers",
        ) from error


def _check_architecture(source: str, raw: Mapping[str, Any], config: Any) -> None:
    declared = [str(name) for name in raw.get("architectures") or ()]
    what = declared[0] if declared else f"model_type {config.model_type!r}"
    hint = "give a model that generates text with a decoder alone, also beside a tower for images or sound"
    if _is_encoder_decoder(raw, config):
        raise ModelError(
            f"{source} is an encoder-decoder model ({what}), not a causal language model", hint=hint
        )
    if remote_class(raw.get("auto_map") or {}) is not None:
        return
    causal, others = causal_names(config.model_type), names_with_towers(config.model_type)
    names = causal | set(others)
    if not names:
        raise ModelError(f"{source} is not a causal language model ({what})", hint=hint)
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", True
    )
    if encoder and not (set(declared) & names):
        raise ModelError(f"{source} is an encoder ({what}), not a causal language model", hint=hint)
    if declared and not any(_may_be_causal(name, names) for name in declared):
        raise ModelError(f"{source} is not a causal language model ({what})", hint=hint)
    if not generates(own_class(config, trust_remote_code=False)):
        raise ModelError(f"{source} ({what}) does not generate text", hint=hint)


def _is_encoder_decoder(raw: Mapping[str, Any], config: Any) -> bool:
    """Whether the model, or the language model inside it, has an encoder for its text."""
    if raw.get("is_encoder_decoder", getattr(config, "is_encoder_decoder", False)):
        return True
    return bool(getattr(getattr(config, "text_config", None), "is_encoder_decoder", False))


def _may_be_causal(declared: str, names: AbstractSet[str]) -> bool:
    """The generating class itself, its bare base model, or another class that opens as one."""
    if declared in names:
        return True
    endings = ("ForCausalLM", "LMHeadModel", "Model", "ForConditionalGeneration")
    return declared.endswith(endings) and not declared.endswith("VisionModel")
