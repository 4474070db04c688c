"""Every setting of a generation_config.json is followed, named as not followed, or an error."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from gptq_cli.errors import CheckpointError
from gptq_cli.evaluation.generation_config import for_generate, read_generation_config, settings_of

VOCABULARY = 512
OWN = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=7))


def read(directory: Path, text: str) -> GenerationConfig:
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
    return read_generation_config(directory, OWN)


def sorted_settings(**settings: Any) -> Any:
    return settings_of(GenerationConfig(**settings), VOCABULARY)


def test_what_transformers_logs_of_the_settings_is_kept_back(tmp_path: Path) -> None:
    logged = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("transformers")
    logger.addHandler(logged)
    try:
        read(tmp_path, '{"temperature": -3, "do_sample": false, "top_p": 7}')  # "flags are not valid"
        assert logged.stream.getvalue() == ""
    finally:
        logger.removeHandler(logged)


def test_without_a_file_the_models_own_settings(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path, OWN) is OWN.generation_config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1, 2]", "holds a list; allowed: an object"),
        ("null", "allowed: an object"),
        ("[" * 100_000, "cannot be read"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"cache_implementation": "magic"}', "cache_implementation is 'magic', which Transformers refuses"),
        ('{"compile_config": {}}', "compile_config is {}, which Transformers refuses"),
        ('{"streamer": 1, "eos_token_id": 1}', "streamer is 1, which Transformers refuses"),
        ('{"watermarking_config": {"x": 1}}', "watermarking_config is .*, which Transformers refuses"),
        ('{"suppress_tokens": [1], "forced_eos_token_id": 1}', "together"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=r"^generation_config\.json") as caught:
        read(tmp_path, text)
    assert caught.match(message)
    assert "generation_config.json" in (caught.value.hint or "")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_generation_config(tmp_path, OWN)


@pytest.mark.parametrize(
    ("settings", "followed"),
    [
        ({"repetition_penalty": 2}, {"repetition_penalty": 2.0}),  # Transformers takes no whole number
        ({"sequence_bias": [[[5], 1]]}, {"sequence_bias": [[[5], 1.0]]}),
        ({"eos_token_id": [1, -1]}, {"eos_token_id": [1]}),
        ({"eos_token_id": -1}, {}),
        (
            {"bad_words_ids": [[1], [2, 3]], "eos_token_id": 1},
            {"bad_words_ids": [[2, 3]], "eos_token_id": [1]},
        ),
        ({"bad_words_ids": [[1]], "eos_token_id": 1}, {"eos_token_id": [1]}),
        ({"exponential_decay_length_penalty": [2, 1.5]}, {}),  # there is no end to lead to
        ({"do_sample": True, "temperature": -3, "top_k": "many", "max_length": 5}, {}),
        ({"transformers_version": "4.1", "output_scores": True, "return_dict_in_generate": True}, {}),
        ({"num_beams": 1, "num_return_sequences": 1, "cache_implementation": "hybrid"}, {"num_beams": 1}),
        ({"repetition_penalty": None, "suppress_tokens": [], "use_mtp": False}, {}),
    ],
)
def test_what_is_followed(settings: dict[str, Any], followed: dict[str, Any]) -> None:
    found = sorted_settings(**settings)
    assert (found.followed, found.note) == (followed, "")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cache_implementation": "quantized"}, "cache_implementation = 'quantized'"),
        ({"cache_implementation": "static"}, "cache_implementation = 'static'"),
        ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences = 3"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha = 0.6"),
        ({"num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beam_groups = 2"),
        ({"dola_layers": "high"}, "dola_layers = 'high'"),
        ({"constraints": [1]}, "constraints = [1]"),
        ({"force_words_ids": [[5]]}, "force_words_ids = [[5]]"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens = 3"),
        ({"assistant_early_exit": 2}, "assistant_early_exit = 2"),
        ({"token_healing": True}, "token_healing = True"),
        ({"chat_format": "chatml"}, "chat_format = 'chatml'"),
    ],
)
def test_what_is_not_followed_is_named(settings: dict[str, Any], named: str) -> None:
    found = sorted_settings(**settings)
    assert named in found.note
    assert found.note.startswith("generation_config.json sets")
    assert not found.followed


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 0},
        {"num_beams": "4"},
        {"num_beams": 10**30},
        {"repetition_penalty": -1},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": True},
        {"no_repeat_ngram_size": -2},
        {"stop_strings": 5},
        {"stop_strings": ["a", ""]},
        {"bad_words_ids": [[VOCABULARY]]},
        {"bad_words_ids": [[]]},
        {"sequence_bias": {"5": 1.0}},
        {"forced_bos_token_id": VOCABULARY},
        {"forced_eos_token_id": [-1]},
        {"eos_token_id": "x"},
        {"min_new_tokens": "a"},
        {"guidance_scale": "x"},
        {"max_time": -1},
        {"min_p": 5},
        {"exponential_decay_length_penalty": "x"},
        {"remove_invalid_values": "yes"},
    ],
    ids=json.dumps,
)
def test_a_value_that_cannot_be_followed_is_an_error(settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name} is .*; allowed: ") as caught:
        sorted_settings(**settings)
    assert caught.value.exit_code == 2


def test_minimal_lengths_are_no_more_than_can_be_made() -> None:
    settings = sorted_settings(
        min_length=500, min_new_tokens=3, min_p=0.1, stop_strings=["x"], eos_token_id=1
    )
    greedy = for_generate(settings, sampled=False, prompt_tokens=4, max_new_tokens=8)
    assert greedy == {"min_length": 12, "min_new_tokens": 3, "eos_token_id": [1]}
    drawn = for_generate(settings, sampled=True, prompt_tokens=4, max_new_tokens=2)
    assert drawn == {"min_length": 6, "min_new_tokens": 2, "eos_token_id": [1], "min_p": 0.1}
