"""Which settings of a model's generation_config.json are followed when text is generated.

The file may hold any setting that Transformers' `generate` takes or once took. There are four kinds:

    followed   penalties, banned and forced tokens, stop strings, beams, …; values are checked before a weight
               is read, because `generate` would only find an invalid one once the model is loaded
    given      temperature, length, cache on or off: the command's own options decide
    about      metadata of the file, and what `generate` returns beside the text
    the rest   several texts at once, other caches, models and loops: not followed, with a note

Unknown settings are of the last kind.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, StopStringCriteria, WatermarkingConfig

from gptq_cli.errors import CheckpointError
from gptq_cli.model.quiet import quiet_log
from gptq_cli.wording import first_line

FILE = "generation_config.json"
MAX_BEAMS = 64
MAX_STOP_STRING = 256
_REMOVE = f"correct it in {FILE}, or take it out of there"

_GIVEN = frozenset(
    {"do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "max_length", "use_cache"}
    | {"pad_token_id", "bos_token_id", "decoder_start_token_id", "disable_compile"}
)
_ABOUT = frozenset(
    {"transformers_version", "return_dict_in_generate", "output_attentions", "output_hidden_states"}
    | {"output_scores", "output_logits"}
)
_SAMPLING = frozenset({"min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"})
"""Followed where tokens are sampled; greedy decoding does not use them."""
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "cache_implementation": ("dynamic", "hybrid", "hybrid_chunked"),  # Transformers takes one for the other
}
"""Values without effect, of settings that are not followed."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """The settings to follow, by Transformers' names, and a note about the others."""

    followed: Mapping[str, Any]
    note: str = ""

    @property
    def beams(self) -> int:
        """Number of beams; with more than 1, no text can be shown before the end."""
        return int(self.followed.get("num_beams", 1))


def read_generation_config(directory: Path, model: Any) -> GenerationConfig:
    """The file's settings, or the model's where there is no file. Raises `CheckpointError`."""
    path = directory / FILE
    if not path.is_file():
        config: GenerationConfig = model.generation_config
        return config
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{FILE} cannot be read: {first_line(error)}", hint=_REMOVE) from error
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{FILE} holds a {type(settings).__name__}; allowed: an object of settings", hint=_REMOVE
        )
    refusal = _refusal(settings)
    if refusal is None:
        return _built(settings)
    alone = [name for name, value in settings.items() if _refusal({name: value}) is not None]
    named = (
        f"{alone[0]} is {_short(settings[alone[0]])}, which" if alone else "its settings together are what"
    )
    raise CheckpointError(
        f"{FILE}: {named} Transformers refuses: {first_line(refusal)}", hint=_REMOVE
    ) from refusal


def _built(settings: Mapping[str, Any]) -> GenerationConfig:
    with warnings.catch_warnings(), quiet_log():
        warnings.simplefilter("ignore")  # deprecations; `settings_of` notes what is not followed
        return GenerationConfig.from_dict(settings)


def _refusal(settings: Mapping[str, Any]) -> Exception | None:
    """Why Transformers does not take the settings; None where it does."""
    try:
        _built(settings)
    except Exception as error:  # noqa: BLE001  # ValueError, TypeError, AttributeError: by setting
        return error
    return None


def settings_of(config: GenerationConfig, vocabulary: int, source: str = FILE) -> GenerationSettings:
    """Sort the settings of `config` for a model of `vocabulary` rows; `source` is the file to name.

    Raises `CheckpointError` naming the first setting whose value cannot be followed.
    """
    followed: dict[str, Any] = {}
    others: list[str] = []
    for name, value in config.to_dict().items():
        if name in _GIVEN or name in _ABOUT or name.startswith("_"):
            continue
        if value is None or value is False or (isinstance(value, str | list | dict) and not value):
            continue  # not set
        rule = _FOLLOWED.get(name)
        if rule is None:
            if value not in _WITHOUT_EFFECT.get(name, ()):
                others.append(f"{name} = {_short(value)}")
        elif not rule.accepts(value, vocabulary):
            raise CheckpointError(
                f"{source}: {name} is {_short(value)}; allowed: {rule.allowed.format(vocabulary=vocabulary)}",
                hint=f"correct it in {source}, or take it out of there",
            )
        else:
            followed[name] = rule.convert(value)
    if "eos_token_id" in followed:
        _without_ends(followed)
    else:
        # it leads to an end token, which the model does not have
        followed.pop("exponential_decay_length_penalty", None)
    note = f"{source} sets {', '.join(others)}: not followed here" if others else ""
    return GenerationSettings(followed, note)


def stop_criterion(settings: GenerationSettings, tokenizer: Any) -> StopStringCriteria | None:
    """The criterion that ends a text at a stop string; None where there are none. Raises
    `CheckpointError`."""
    strings = settings.followed.get("stop_strings")
    if strings is None:
        return None
    try:
        return StopStringCriteria(tokenizer, strings)
    except Exception as error:  # it decodes the whole vocabulary, which not every tokenizer allows
        raise CheckpointError(
            f"{FILE}: stop_strings {_short(strings)} cannot be matched with this tokenizer: "
            f"{first_line(error)}",
            hint=_REMOVE,
        ) from error


def for_generate(
    settings: GenerationSettings, *, sampled: bool, prompt_tokens: int, max_new_tokens: int
) -> dict[str, Any]:
    """The followed settings as `generate` takes them for one prompt."""
    leave = {"stop_strings"} if sampled else {"stop_strings", *_SAMPLING}
    kept = {name: value for name, value in settings.followed.items() if name not in leave}
    for name, limit in (("min_length", prompt_tokens + max_new_tokens), ("min_new_tokens", max_new_tokens)):
        if name in kept:
            kept[name] = min(kept[name], limit)
    return kept


def _without_ends(followed: dict[str, Any]) -> None:
    """Keep the end tokens that exist, and drop banned words that are end tokens, as Transformers does."""
    ends = followed["eos_token_id"]
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end >= 0]
    if not ends:
        del followed["eos_token_id"]
    else:
        followed["eos_token_id"] = ends
    banned = [word for word in followed.pop("bad_words_ids", []) if word not in [[end] for end in ends]]
    if banned:
        followed["bad_words_ids"] = banned


Accepts = Callable[[Any, int], bool]


@dataclass(frozen=True, slots=True)
class _Rule:
    allowed: str
    accepts: Accepts
    convert: Callable[[Any], Any] = lambda value: value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) < 1e30 and math.isfinite(value)


def _integer(low: int, high: int = 2**31 - 1) -> Accepts:
    return lambda value, vocabulary: _is_int(value) and low <= value <= high


def _between(low: float, high: float) -> Accepts:
    return lambda value, vocabulary: _is_number(value) and low <= value <= high


def _above(low: float, high: float = 1e30) -> Accepts:
    return lambda value, vocabulary: _is_number(value) and low < value <= high


def _token(value: Any, vocabulary: int) -> bool:
    return _is_int(value) and 0 <= value < vocabulary


def _tokens(value: Any, vocabulary: int) -> bool:
    return isinstance(value, list) and bool(value) and all(_token(item, vocabulary) for item in value)


def _token_or_tokens(value: Any, vocabulary: int) -> bool:
    return _token(value, vocabulary) or _tokens(value, vocabulary)


def _ids(value: Any, vocabulary: int) -> bool:
    """Any integers: -1 commonly means "none", and an id past the vocabulary never occurs."""
    return isinstance(value, list) and all(_is_int(item) and abs(item) < 2**31 for item in value)


def _id_or_ids(value: Any, vocabulary: int) -> bool:
    return _ids(value if isinstance(value, list) else [value], vocabulary)


def _words(value: Any, vocabulary: int) -> bool:
    return isinstance(value, list) and all(_tokens(word, vocabulary) for word in value)


def _biases(value: Any, vocabulary: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and _tokens(item[0], vocabulary) and _is_number(item[1])
        for item in value
    )


def _strings(value: Any, vocabulary: int) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, list) and all(
        isinstance(text, str) and 0 < len(text) <= MAX_STOP_STRING for text in strings
    )


def _decay(value: Any, vocabulary: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_int(value[0])
        and 0 <= value[0] < 2**31
        and _is_number(value[1])
        and value[1] > 0
    )


def _true(value: Any, vocabulary: int) -> bool:
    return value is True


def _watermark(value: Any, vocabulary: int) -> bool:
    try:
        (value if isinstance(value, WatermarkingConfig) else WatermarkingConfig.from_dict(value)).validate()
    except Exception:  # noqa: BLE001  # whatever it cannot be made of
        return False
    return True


_FOLLOWED: dict[str, _Rule] = {
    "num_beams": _Rule(f"1 to {MAX_BEAMS}", _integer(1, MAX_BEAMS)),
    "early_stopping": _Rule("true, false or 'never'", lambda value, _: value is True or value == "never"),
    "length_penalty": _Rule("a number from -1000 to 1000", _between(-1000, 1000), float),
    "eos_token_id": _Rule("a token id, or a list of them", _id_or_ids),
    "stop_strings": _Rule(f"a text, or a list of them, of 1 to {MAX_STOP_STRING} characters", _strings),
    "max_time": _Rule("seconds, above 0", _above(0), float),
    "min_length": _Rule("a whole number of at least 0", _integer(0)),
    "min_new_tokens": _Rule("a whole number of at least 0", _integer(0)),
    "repetition_penalty": _Rule("a number above 0", _above(0), float),
    "encoder_repetition_penalty": _Rule("a number above 0", _above(0), float),
    "no_repeat_ngram_size": _Rule("a whole number of at least 0", _integer(0)),
    "encoder_no_repeat_ngram_size": _Rule("a whole number of at least 0", _integer(0)),
    "bad_words_ids": _Rule("a list of lists of token ids below {vocabulary}", _words),
    "sequence_bias": _Rule(
        "a list of [token ids below {vocabulary}, number] pairs",
        _biases,
        lambda value: [[ids, float(bias)] for ids, bias in value],
    ),
    "forced_bos_token_id": _Rule("a token id below {vocabulary}", _token),
    "forced_eos_token_id": _Rule("a token id below {vocabulary}, or a list of them", _token_or_tokens),
    "suppress_tokens": _Rule("a list of token ids", _ids),
    "begin_suppress_tokens": _Rule("a list of token ids", _ids),
    "exponential_decay_length_penalty": _Rule(
        "[a whole number of at least 0, a number above 0]", _decay, lambda value: (value[0], float(value[1]))
    ),
    "remove_invalid_values": _Rule("true or false", _true),
    "renormalize_logits": _Rule("true or false", _true),
    "guidance_scale": _Rule("a number from 0 to 1000", _between(0, 1000), float),
    "watermarking_config": _Rule("what Transformers' WatermarkingConfig takes", _watermark),
    "min_p": _Rule("0 to 1", _between(0, 1), float),
    "typical_p": _Rule("above 0, at most 1", _above(0, 1), float),
    "epsilon_cutoff": _Rule("0 to 1", _between(0, 1), float),
    "eta_cutoff": _Rule("0 to 1", _between(0, 1), float),
    "top_h": _Rule("above 0, at most 1", _above(0, 1), float),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
