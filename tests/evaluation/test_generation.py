"""A prompt becomes the text that the dense model would give; pieces join to it; nothing global changes."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from gptq_cli.calibration import open_tokenizer
from gptq_cli.errors import CheckpointError, ConfigError, NonFinite
from gptq_cli.evaluation.generation import TextPieces, generate
from gptq_cli.evaluation.prompt import encode_prompt
from gptq_cli.load_job import Sampling
from tests.checkpoint.checkpoints import Recipe, dense_copy, quantize_directory
from tests.inference.test_load import load

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def opened(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """(packed model, its dense copy, tokenizer), float32."""
    target = tmp_path_factory.mktemp("generation") / "q"
    weights = quantize_directory(tiny_llama, target, Recipe(group_size=32))
    return load(target), dense_copy(tiny_llama, weights, torch.float32), open_tokenizer(target)


def test_greedy_text_is_that_of_the_dense_copy(opened: tuple[Any, Any, Any]) -> None:
    model, dense_copy, tokenizer = opened
    pieces: list[str] = []
    counts: list[int] = []

    def take(text: str, tokens: int) -> None:
        pieces.append(text)
        counts.append(tokens)

    made = generate(model, tokenizer, "The import statement", 24, take)
    ids = tokenizer("The import statement", return_tensors="pt")["input_ids"]
    out = dense_copy.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=1
    )
    assert made.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert "".join(pieces) == made.text
    assert len(pieces) > 3
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] <= made.new_tokens
    assert made.new_tokens == out.shape[1] - ids.shape[1]
    assert made.prompt_tokens == ids.shape[1]
    assert 0 < made.first_token_seconds < made.seconds
    assert made.tokens_per_second > 0


def test_what_transformers_logs_of_a_generation_is_kept_back(
    opened: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, tokenizer = opened
    logged = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("transformers")
    logger.addHandler(logged)
    monkeypatch.setattr(model.config, "max_position_embeddings", 4)  # "has exceeded the … maximum length"
    try:
        generate(model, tokenizer, "The import statement", 8)
        assert logged.stream.getvalue() == ""
        logger.error("heard")
        logger.warning("heard again")
    finally:
        logger.removeHandler(logged)
    assert logged.stream.getvalue() == "heard\nheard again\n"


def test_at_most_as_many_tokens_as_asked_for(opened: tuple[Any, Any, Any]) -> None:
    model, _, tokenizer = opened
    made = generate(model, tokenizer, "x", 1)
    assert made.new_tokens == 1
    assert made.tokens_per_second is None


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(opened: tuple[Any, Any, Any]) -> None:
    model, _, tokenizer = opened
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    hot = {
        seed: generate(model, tokenizer, "a", 16, sampling=Sampling(temperature=2.0, seed=seed))
        for seed in (0, 1)
    }
    again = generate(model, tokenizer, "a", 16, sampling=Sampling(temperature=2.0, seed=0))
    assert again.text == hot[0].text != hot[1].text
    assert torch.equal(torch.rand(1), expected)


def test_chat_template_unless_raw(opened: tuple[Any, Any, Any]) -> None:
    tokenizer = opened[2]
    plain = encode_prompt(tokenizer, "hello")
    tokenizer.chat_template = TEMPLATE
    try:
        chat = encode_prompt(tokenizer, "hello")
        assert tokenizer.decode(chat[0]) == "<s>hello</s>>"
        assert torch.equal(encode_prompt(tokenizer, "hello", raw=True), plain)
    finally:
        tokenizer.chat_template = None


def test_an_empty_prompt(opened: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        encode_prompt(opened[2], "")


def test_pieces_wait_for_whole_characters(opened: tuple[Any, Any, Any]) -> None:
    tokenizer = opened[2]
    text = "naïve € 漢字 done"
    ids = tokenizer(text)["input_ids"]
    pieces: list[str] = []
    streamer = TextPieces(tokenizer, lambda text, tokens: pieces.append(text))
    streamer.put(torch.tensor([[5, 6]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert streamer.tokens == len(ids)


def test_a_text_cut_inside_a_character_comes_out_at_the_end(opened: tuple[Any, Any, Any]) -> None:
    tokenizer = opened[2]
    ids = tokenizer("漢")["input_ids"][:-1]
    pieces: list[str] = []
    streamer = TextPieces(tokenizer, lambda text, tokens: pieces.append(text))
    streamer.put(torch.tensor([[5]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    assert pieces == []
    streamer.end()
    assert "".join(pieces) == tokenizer.decode(ids)


SPACED = ["\u2581", "\u2581then", "\u2581more", "\u2581'", "\u2581m", "\u2581x", "'", "m", "\u2581.", "."]


def byte_fallback() -> PreTrainedTokenizerFast:
    """As in Llama 2, Mistral and Gemma: what is not a word is spelt in bytes, `<0xE9>`."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    vocabulary |= {word: 258 + number for number, word in enumerate(SPACED)}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.add_special_tokens(["</s>", AddedToken("<|end|>", special=True)])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def cleaned_up() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in SPACED)], 0))
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", clean_up_tokenization_spaces=True
    )


def streamed(tokenizer: Any, ids: list[int]) -> tuple[list[str], TextPieces]:
    pieces: list[str] = []
    streamer = TextPieces(tokenizer, lambda text, tokens: pieces.append(text))
    streamer.put(torch.tensor([[5, 6]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces, streamer


def spelt(tokenizer: Any, *parts: str | bytes) -> list[int]:
    """Ids of words as they are, and of bytes one by one."""
    names = [
        name
        for part in parts
        for name in ([part] if isinstance(part, str) else [f"<0x{byte:02X}>" for byte in part])
    ]
    return list(tokenizer.convert_tokens_to_ids(names))


@pytest.mark.parametrize(
    "parts",
    [
        (b"\xc3\xa9\xff", "\u2581then", "\u2581more", "\u2581x"),
        ("\u2581x", "é漢字".encode() * 4 + b"\xff", "\u2581then"),
        ("\u2581x", "é".encode(), "</s>", b"\xff", "\u2581then"),
        ("\u2581x", "é".encode(), "<|end|>", b"\xff", "\u2581then", "\u2581more"),
        (b"\xe6\xbc\xa2", "\u2581x", b"\xe6\xbc"),
    ],
)
def test_bytes_that_turn_out_to_be_no_text_lose_nothing(parts: tuple[str | bytes, ...]) -> None:
    tokenizer = byte_fallback()
    ids = spelt(tokenizer, *parts)
    pieces, streamer = streamed(tokenizer, ids)
    assert "".join(pieces) == streamer.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_words_do_not_wait_for_the_end() -> None:
    tokenizer = byte_fallback()
    pieces, _ = streamed(tokenizer, spelt(tokenizer, *["\u2581then", "\u2581more"] * 5))
    assert len(pieces) == 10


@pytest.mark.parametrize(
    "words",
    [
        ("\u2581x", "\u2581'", "\u2581m", "\u2581more", "\u2581then"),
        ("\u2581x", "\u2581", "'", "m", "\u2581", ".", "\u2581more", "\u2581then", "\u2581more"),
        ("\u2581x", "\u2581more", "\u2581then", "\u2581more", "\u2581.", "\u2581."),
    ],
)
def test_spaces_that_are_cleaned_up_later_lose_nothing(words: tuple[str, ...]) -> None:
    tokenizer = cleaned_up()
    ids = spelt(tokenizer, *words)
    pieces, streamer = streamed(tokenizer, ids)
    assert "".join(pieces) == streamer.text == tokenizer.decode(ids)


def test_a_decoder_that_changes_everything_loses_nothing() -> None:
    class Capitals:
        """Decodes to capitals once there are five tokens."""

        def decode(self, ids: list[int], **_: Any) -> str:
            text = "".join("abcdefgh"[token] for token in ids)
            return text.upper() if len(ids) > 4 else text

        def convert_ids_to_tokens(self, token: int) -> str:
            return "abcdefgh"[token]

    pieces, streamer = streamed(Capitals(), list(range(8)))
    assert streamer.text == "ABCDEFGH"
    assert "".join(pieces).endswith("ABCDEFGH")


@pytest.fixture
def guided(opened: tuple[Any, Any, Any]) -> Any:
    """`guided(setting=…)`: a text with these settings in the generation config, which is put back."""
    model, _, tokenizer = opened
    own = model.generation_config

    def call(*, new: int = 12, sampling: Sampling | None = None, **settings: Any) -> Any:
        pieces: list[str] = []
        model.generation_config = config = GenerationConfig(**settings)
        made = generate(
            model,
            tokenizer,
            "The import",
            new,
            lambda text, _: pieces.append(text),
            sampling=sampling or Sampling(),
        )
        assert model.generation_config is config
        assert "".join(pieces) == made.text
        return made

    yield call
    model.generation_config = own


def test_settings_that_are_followed(guided: Any, opened: tuple[Any, Any, Any]) -> None:
    _, dense_copy, tokenizer = opened
    plain = guided()
    ids = tokenizer("The import", return_tensors="pt")["input_ids"]

    def expected(**settings: Any) -> Tensor:
        out = dense_copy.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1, **settings)
        text: Tensor = out[0, ids.shape[1] :]
        return text

    other = {"suppress_tokens": expected()[:1].tolist()}
    for settings in ({"num_beams": 3}, {"repetition_penalty": 3.0}, other):
        made = guided(**settings)
        assert made.text == tokenizer.decode(expected(**settings), skip_special_tokens=True)
        assert made.text != plain.text
        assert made.new_tokens == 12
        assert made.tokens_per_second > 0
    assert guided(repetition_penalty=3).text == guided(repetition_penalty=3.0).text


def test_a_stop_string_ends_the_text(guided: Any) -> None:
    text = guided().text
    stop = next(text[at : at + 2] for at in range(2, len(text)) if text[at : at + 2].isascii())
    made = guided(stop_strings=[stop])
    assert made.new_tokens < 12
    assert stop in made.text
    assert text.startswith(made.text)
    with pytest.raises(CheckpointError, match="stop_strings is 5; allowed: a text"):
        guided(stop_strings=5)


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "quantized"},
        {"num_return_sequences": 3, "do_sample": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"token_healing": True},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"max_length": 3, "use_cache": False},
        {"min_new_tokens": 500, "eos_token_id": 1},
    ],
)
def test_settings_that_change_nothing(guided: Any, settings: dict[str, Any]) -> None:
    assert guided(**settings).text == guided().text


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.5},
        {"watermarking_config": {"bias": 2.5}},
        {"min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_h": 0.5},
        {"num_beams": 2, "early_stopping": "never", "length_penalty": 2},
        {"exponential_decay_length_penalty": [2, 1.5], "eos_token_id": 1},
        {
            "sequence_bias": [[[5], 3]],
            "bad_words_ids": [[6]],
            "forced_bos_token_id": 3,
            "no_repeat_ngram_size": 2,
        },
        {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 2, "forced_eos_token_id": [1, 2]},
    ],
)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.9, top_k=40)])
def test_settings_that_must_run(guided: Any, settings: dict[str, Any], sampling: Sampling) -> None:
    assert 1 <= guided(sampling=sampling, **settings).new_tokens <= 12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("settings", [{}, {"remove_invalid_values": True}, {"num_beams": 2}])
def test_a_prediction_that_is_not_finite_is_no_text(
    opened: tuple[Any, Any, Any], guided: Any, value: float, temperature: float, settings: dict[str, Any]
) -> None:
    """Greedy decoding took token 0 as often as it was asked to, and the load was reported as sound."""
    model, _, _ = opened
    norm = model.get_decoder().norm.weight
    before = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(value)
    try:
        with pytest.raises(NonFinite, match="prediction of the next token is not finite"):
            guided(new=4, sampling=Sampling(temperature=temperature), **settings)
        assert not model._forward_hooks
    finally:
        with torch.no_grad():
            norm.copy_(before)


def test_probabilities_that_are_none(guided: Any) -> None:
    with pytest.raises(NonFinite, match="not finite"):
        guided(sampling=Sampling(temperature=1e-45))
