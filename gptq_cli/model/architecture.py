"""Whether a config.json is a causal language model's, decided before anything is built.

Encoders, encoder-decoders and vision models are named as what they are. Python code from a model's repository
is not run without leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from gptq_cli.config import ModelRef
from gptq_cli.errors import ModelError
from gptq_cli.model.config_types import check_types
from gptq_cli.model.source import ModelFiles, read_json


def raw_config(files: ModelFiles) -> Mapping[str, Any]:
    """config.json as it stands. Raises `ModelError`."""
    try:
        raw = read_json(files.directory / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"{files.source}: config.json cannot be read: {error}") from error
    if not isinstance(raw, Mapping):
        raise ModelError(f"{files.source}: config.json is no JSON object")
    check_types(files.source, raw)
    return raw


def load_config(files: ModelFiles, ref: ModelRef) -> Any:
    """The model's config object, judged to be a causal language model's. Raises `ModelError`."""
    raw = raw_config(files)
    if raw.get("auto_map") and not ref.trust_remote_code and raw.get("model_type") not in _known_types():
        raise ModelError(
            f"{files.source} (model_type {raw.get('model_type')!r}) needs Python code from its repository",
            hint="read that code, then add --trust-remote-code",
        )
    if "transformers_weights" in raw:
        raise ModelError(
            f"{files.source}: config.json sends the reader to other files (transformers_weights)"
        )
    if "model_type" not in raw:
        raise ModelError(f"{files.source}: config.json names no model_type, so its architecture is unknown")
    _judge_layers(files, raw)
    try:
        config = AutoConfig.from_pretrained(
            files.directory, trust_remote_code=ref.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        unknown = "does not recognize this architecture" in str(error)
        raise ModelError(
            f"{files.source}: config.json is not understood: {first_line(error)}",
            hint="a newer transformers may know this architecture: pip install -U transformers"
            if unknown
            else "compare config.json with the one that the model was published with",
        ) from error
    _judge_architecture(files.source, raw, config)
    return config


def _judge_layers(files: ModelFiles, raw: Mapping[str, Any]) -> None:
    """Refuse a config that would build more layers than there are tensors, before anything is built of it."""
    parts = [raw, *(part for part in raw.values() if isinstance(part, Mapping))]
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        for layers in (part.get(name) for part in parts):
            if files.tensors and isinstance(layers, int) and layers > len(files.tensors):
                raise ModelError(
                    f"{files.source}: config.json asks for {layers} layers ({name}), "
                    f"but the files hold {len(files.tensors)} tensors"
                )


def _known_types() -> frozenset[str]:
    return frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _judge_architecture(source: str, raw: Mapping[str, Any], config: Any) -> None:
    declared = [str(name) for name in raw.get("architectures") or ()]
    what = declared[0] if declared else f"model_type {config.model_type!r}"
    hint = "give a decoder-only language model (one that AutoModelForCausalLM opens)"
    if raw.get("is_encoder_decoder", getattr(config, "is_encoder_decoder", False)):
        raise ModelError(
            f"{source} is an encoder-decoder model ({what}), not a causal language model", hint=hint
        )
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        return
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if causal is None:
        raise ModelError(f"{source} is no causal language model ({what})", hint=hint)
    names = {causal} if isinstance(causal, str) else set(causal)
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", True
    )
    if encoder and not (set(declared) & names):
        raise ModelError(f"{source} is an encoder ({what}), not a causal language model", hint=hint)
    if declared and not any(_may_be_causal(name, names) for name in declared):
        raise ModelError(f"{source} is no causal language model ({what})", hint=hint)


def _may_be_causal(declared: str, names: set[str]) -> bool:
    """The causal class itself, its bare base model, or a text-and-image class that Transformers opens as
    one."""
    if declared in names:
        return True
    endings = ("ForCausalLM", "LMHeadModel", "Model", "ForConditionalGeneration")
    return declared.endswith(endings) and not declared.endswith("VisionModel")


def quant_method(raw: Mapping[str, Any]) -> str | None:
    """The quantization that config.json names, None for a dense model."""
    quantization = raw.get("quantization_config")
    text_config = raw.get("text_config")
    if quantization is None and isinstance(text_config, Mapping):
        quantization = text_config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return str(method or "unknown")


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, and the next where it ends in a colon; else its class."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
