"""Conversations to measure on: whole ones in a window, and only the tokens of their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_cli.calibration import evaluation_windows, make_batches, open_tokenizer
from gptq_cli.calibration.documents import answer_spans
from gptq_cli.config import CalibrationConfig

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] | trim }}</s>{% endfor %}"
TALK = [
    {"role": "user", "content": "Say it twice."},
    {"role": "assistant", "content": "Say it twice. Say it twice."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": " Nothing. "},
]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    tokenizer = open_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows(path: Path, *conversations: object) -> str:
    path.write_text("".join(f"{json.dumps({'messages': one})}\n" for one in conversations))
    return str(path)


def test_answers_are_found_in_order() -> None:
    text = "user: Say it twice. assistant: Say it twice. Say it twice. user: And now? assistant: Nothing."
    spans = answer_spans(text, TALK)
    assert [text[begin:end] for begin, end in spans] == ["Say it twice. Say it twice.", "Nothing."]
    assert answer_spans("the template wrote something else", TALK) == ()


def test_only_answers_count(tokenizer: Any, tmp_path: Path) -> None:
    found = evaluation_windows(tokenizer, rows(tmp_path / "a.jsonl", TALK), 128, 4)
    assert found.answers is not None
    assert found.input_ids.shape == found.answers.shape == (1, 128)
    counted = tokenizer.decode(found.input_ids[0][found.answers[0]])
    assert counted.replace(" ", "") == "Sayittwice.Sayittwice.</s>Nothing.</s>"
    assert "user: And now?" in tokenizer.decode(found.input_ids[0][~found.answers[0]])


def test_a_window_begins_with_a_conversation(tokenizer: Any, tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": f"number {i}?"}, {"role": "assistant", "content": "yes " * (3 + i)}]
             for i in range(6)]  # fmt: skip
    source = rows(tmp_path / "a.jsonl", *talks)
    found = evaluation_windows(tokenizer, source, 60, 99)
    assert found.answers is not None
    whole = "".join(tokenizer.decode(row[: int(a.nonzero().max()) + 1]) for row, a in zip(
        found.input_ids, found.answers, strict=True))  # fmt: skip
    for number in range(6):
        assert whole.count(f"number {number}?") == 1
    for row in found.input_ids:
        assert tokenizer.decode(row).startswith("<s>user: number")
    fewer = evaluation_windows(tokenizer, source, 60, 2)
    assert torch.equal(fewer.input_ids, found.input_ids[:2])


def test_a_long_conversation_is_cut_at_the_end_of_its_window(tokenizer: Any, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "word " * 300}]
    found = evaluation_windows(tokenizer, rows(tmp_path / "a.jsonl", talk, TALK), 64, 9)
    assert found.answers is not None
    assert len(found.input_ids) == 2
    assert found.answers[0, 20:].all()


def test_conversations_without_an_answer_are_measured_whole(tokenizer: Any, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "words " * 50}]
    found = evaluation_windows(tokenizer, rows(tmp_path / "a.jsonl", talk), 32, 9)
    assert found.answers is None
    assert len(found.input_ids) >= 1


def test_a_slow_tokenizer_measures_everything(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    found = evaluation_windows(tokenizer, rows(tmp_path / "a.jsonl", TALK), 16, 9)
    assert found.answers is None


def test_plain_text_is_as_before(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps({'text': 'some words ' * 9})}\n" for _ in range(9)))
    assert evaluation_windows(tokenizer, str(path), 16, 4).answers is None


def test_calibration_cuts_conversations_as_before(tokenizer: Any, tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", *[TALK] * 9)
    found = make_batches(tokenizer, CalibrationConfig.of(source, samples=4, seq_len=32))
    assert found.answers is None
    assert found.input_ids.shape == (4, 32)
