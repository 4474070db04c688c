"""Conversations to measure on: whole ones in a window, and only the tokens of their answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gptq_cli
from gptq_cli.calibration import documents, evaluation_windows, make_batches, open_tokenizer
from gptq_cli.calibration.answers import answer_spans
from gptq_cli.calibration.conversations import Conversations
from gptq_cli.config import CalibrationConfig
from gptq_cli.errors import CalibrationError
from gptq_cli.jobs import texts
from gptq_cli.jobs.texts import check_answers

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


CHATML = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}"""
QWEN3 = """{%- for m in messages -%}
{%- set c = m.content.split('</think>')[-1].lstrip('\n') -%}
{%- set r = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' -%}
<|im_start|>{{ m.role }}
{% if loop.last %}<think>
{{ r.strip('\n') }}
</think>

{% endif %}{{ c }}<|im_end|>
{% endfor -%}"""
WITHOUT_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{{ loop.index }} {{ m.content|trim }} | {% endfor %}"
)
PARTS = "{% for m in messages %}[{% for c in m.content %}{{ c.text }}{% endfor %}]{% endfor %}"
AS_JSON = "{% for m in messages %}{{ m.content | tojson }}\n{% endfor %}"


def said(template: str, tokenizer: Any, *contents: str) -> list[str]:
    """What is found of the answers; the first content is a system message's, then user and assistant."""
    tokenizer.chat_template = template
    roles = ["system", *["user", "assistant"] * len(contents)]
    talk = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    render = Conversations(tokenizer)
    text = render(talk)
    return [text[begin:end] for begin, end in answer_spans(text, talk, render, "a source")]


@pytest.mark.parametrize("template", [CHATML, QWEN3, WITHOUT_SYSTEM, PARTS, AS_JSON])
def test_short_answers_are_found_behind_the_words_of_the_template(template: str, tokenizer: Any) -> None:
    found = said(template, tokenizer, "s", "user", "a", "i", "d", "assistant", "user", "", "1")
    assert [one.strip('"') for one in found] == ["a", "d", "user", "1"]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML, [" Yes. Yes.\n", "<think>hm</think>No", "<think>\nhm\n</think>\n\nYes"]),
        (QWEN3, [" Yes. Yes.\n", "No", "hm\n</think>\n\nYes"]),
        (WITHOUT_SYSTEM, ["Yes. Yes.", "<think>hm</think>No", "<think>\nhm\n</think>\n\nYes"]),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", []),
    ],
    ids=["as it is", "reasoning of the last turn alone", "trimmed", "in capitals"],
)
def test_an_answer_is_what_the_template_writes_of_it(template: str, found: list[str], tokenizer: Any) -> None:
    answers = [" Yes. Yes.\n", "<think>hm</think>No", "<think>\nhm\n</think>\n\nYes"]
    talk = [one for answer in answers for one in ("Yes.", answer)]
    assert said(template, tokenizer, "Yes.", *talk) == found


def test_a_template_that_fails_on_the_way_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'qzjxkv' and messages | length > 2 %}"
        "{{ raise_exception('odd') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(CalibrationError, match=r"a\.jsonl.*chat template refuses the conversation: odd"):
        evaluation_windows(tokenizer, rows(tmp_path / "a.jsonl", TALK[:2], TALK), 128, 4)


def test_answers_behind_the_windows_are_an_error(tokenizer: Any, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "words " * 50}, TALK[1]]
    source = rows(tmp_path / "a.jsonl", long, TALK[:1], [*TALK[:1], *long])
    with pytest.raises(
        CalibrationError, match=r"a\.jsonl has no answer within 32 tokens.* has \d+$"
    ) as caught:
        evaluation_windows(tokenizer, source, 32, 9)
    seq_len = int(str(caught.value.hint).rpartition("--seq-len ")[2])
    found = evaluation_windows(tokenizer, source, seq_len, 9)
    assert found.answers is not None
    assert found.answers.any()


def test_conversations_that_are_left_out_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "words " * 50}, TALK[1]]
    source = rows(tmp_path / "a.jsonl", TALK[:2], long, TALK[:1], long, TALK[:2])
    found = evaluation_windows(tokenizer, source, 32, 9)
    assert found.left_out == 2
    (warned,) = check_answers(found)
    assert warned.message == (f"2 conversations of {source} are left out: no answer within 32 tokens")
    (one,) = check_answers(replace(found, left_out=1))
    assert one.message == f"1 conversation of {source} is left out: no answer within 32 tokens"
    assert check_answers(evaluation_windows(tokenizer, source, 256, 9)) == []


def test_conversations_that_are_too_long_are_counted(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 400)
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 400)
    long = [{"role": "user", "content": "words " * 200}, TALK[1]]
    first = evaluation_windows(tokenizer, rows(tmp_path / "b.jsonl", long[:1], TALK[:2]), 64, 9)
    assert first.answers is not None  # one without an answer does not make a text of the others
    source = rows(tmp_path / "a.jsonl", long, TALK[:2], long[:1], long)
    found = evaluation_windows(tokenizer, source, 64, 9)
    assert found.answers is not None
    assert (found.left_out, found.too_long) == (0, 2)
    (warned,) = check_answers(found)
    assert warned.message == (f"2 conversations of {source} are left out: more than 400 characters")


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


def test_conversations_that_no_template_writes_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    """They are read as their messages in turn, which is not how a chat model is used."""
    source = rows(tmp_path / "chat.jsonl", *[TALK] * 60)
    config = CalibrationConfig.of(source, samples=2, seq_len=32)
    plain = open_tokenizer(tiny_llama)
    assert make_batches(plain, config).joined > 0
    measured = evaluation_windows(plain, source, 32, 2)
    (warned,) = check_answers(measured)
    assert "the model has no chat template" in warned.message
    plain.chat_template = TEMPLATE
    assert make_batches(plain, config).joined == 0
    assert check_answers(evaluation_windows(plain, source, 64, 2)) == []


def test_a_run_on_conversations_without_a_template_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    source = rows(tmp_path / "chat.jsonl", *[TALK] * 60)
    report = gptq_cli.quantize(
        tiny_llama,
        tmp_path / "out",
        group_size=32,
        calibration=source,
        samples=2,
        seq_len=32,
        device_map="cpu",
    )
    assert any("no chat template" in warning for warning in report.warnings)


def test_a_run_on_a_table_as_text_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    """Of the text to measure on, too: of each source by its name."""
    source = Path(rows(tmp_path / "chat.jsonl", *[TALK] * 60)).rename(tmp_path / "chat.txt")
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "some words,1\n" * 99)
    report = gptq_cli.quantize(
        tiny_llama,
        tmp_path / "out",
        group_size=32,
        calibration=str(source),
        samples=2,
        seq_len=32,
        device_map="cpu",
    )
    (warned,) = [warning for warning in report.warnings if "plain text" in warning]
    assert "JSON lines" in warned
    (measured,) = check_answers(evaluation_windows(open_tokenizer(tiny_llama), str(table), 32, 2))
    assert "comma-separated values" in measured.message
    assert "--calibration" not in str(measured.hint)
