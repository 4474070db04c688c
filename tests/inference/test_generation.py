"""A prompt becomes the text that the dense model would give; pieces join to it; nothing global changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_cli.calibration import open_tokenizer
from gptq_cli.config import Sampling
from gptq_cli.errors import ConfigError
from gptq_cli.inference.generation import TextPieces, encode_prompt, generate
from tests.inference.checkpoints import Recipe, dense_twin, quantize_directory
from tests.inference.test_opening import load

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def opened(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """(packed model, its dense twin, tokenizer), float32."""
    target = tmp_path_factory.mktemp("generation") / "q"
    weights = quantize_directory(tiny_llama, target, Recipe(group_size=32))
    return load(target), dense_twin(tiny_llama, weights, torch.float32), open_tokenizer(target)


def test_greedy_text_is_the_dense_twins(opened: tuple[Any, Any, Any]) -> None:
    model, twin, tokenizer = opened
    pieces: list[str] = []
    counts: list[int] = []

    def take(text: str, tokens: int) -> None:
        pieces.append(text)
        counts.append(tokens)

    made = generate(model, tokenizer, "The import statement", 24, take)
    ids = tokenizer("The import statement", return_tensors="pt")["input_ids"]
    out = twin.generate(
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


def test_at_most_as_many_tokens_as_asked_for(opened: tuple[Any, Any, Any]) -> None:
    model, _, tokenizer = opened
    made = generate(model, tokenizer, "x", 1)
    assert made.new_tokens == 1
    assert made.tokens_per_second == 0.0


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
