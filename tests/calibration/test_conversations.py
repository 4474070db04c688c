"""A conversation's contents reach the text in whatever form the chat template takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptq_cli.calibration import open_tokenizer
from gptq_cli.calibration.conversations import Conversations
from gptq_cli.errors import ModelError

MESSAGES = [{"role": "user", "content": "plain words"}, {"role": "assistant", "content": "an answer"}]
TEXT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
EACH = "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
PARTS = TEXT.replace("{{ m['content'] }}", EACH)
STRICT = PARTS.replace(
    "{{ c['text'] }}", "{% if c is string %}{{ raise_exception('parts!') }}{% endif %}{{ c.text }}"
)
WRITTEN = "user: plain words;assistant: an answer;"


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return open_tokenizer(tiny_llama, False)


@pytest.mark.parametrize(
    ("template", "written"),
    [(TEXT, WRITTEN), (PARTS, WRITTEN), (STRICT, WRITTEN), (TEXT.replace("t']", "t']|upper"), "")],
    ids=["text", "parts", "strict", "upper"],
)
def test_contents_are_printed(template: str, written: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    render = Conversations(tokenizer)
    for _ in range(2):
        assert render(MESSAGES) == (written or "user: PLAIN WORDS;assistant: AN ANSWER;")


def test_a_conversation_without_contents_decides_nothing(tokenizer: Any) -> None:
    tokenizer.chat_template = PARTS
    render = Conversations(tokenizer)
    assert render([{"role": "user", "content": ""}]) == "user: ;"
    assert render(MESSAGES) == WRITTEN


@pytest.mark.parametrize("template", ["hello", "{{ messages[0].role }}"])
def test_a_template_that_leaves_the_contents_out_is_an_error(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="leaves the contents of the messages out"):
        Conversations(tokenizer)(MESSAGES)
