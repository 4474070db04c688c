"""A prompt becomes tokens: templates of every kind, and tokenizers that put tokens around a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from gptq_cli.calibration import open_tokenizer
from gptq_cli.errors import ConfigError
from gptq_cli.evaluation.prompt import encode_prompt, render_chat
from tests.tiny import save_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_tokenizer(tmp_path)
    return open_tokenizer(tmp_path)


def around(tokenizer: Any, template: str) -> None:
    """Make the tokenizer put special tokens around every text: `<s> $A </s>`."""
    ids = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=ids
    )


@pytest.mark.parametrize(
    ("single", "prompt", "text"),
    [
        ("$A </s>", "hello", "hello"),
        ("<s> $A </s>", "hello", "<s>hello"),
        ("<s> $A </s> </s>", "hello", "<s>hello"),
        ("<s> $A", "hello", "<s>hello"),
        ("<s> $A </s>", "<s>hello", "<s>hello"),
        ("<s> $A </s>", "hello</s>", "<s>hello</s>"),
        ("<s> $A </s>", "</s>", "<s></s>"),
        ("<s> $A </s>", "", "<s>"),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_a_prompt_ends_where_its_text_ends(
    tokenizer: Any, single: str, prompt: str, text: str, raw: bool
) -> None:
    around(tokenizer, single)
    assert tokenizer.decode(encode_prompt(tokenizer, prompt, raw=raw)[0]) == text


def test_nothing_but_an_end_token_is_an_empty_prompt(tokenizer: Any) -> None:
    around(tokenizer, "$A </s>")
    with pytest.raises(ConfigError, match="no tokens"):
        encode_prompt(tokenizer, "")


def test_a_template_says_itself_how_a_prompt_begins_and_ends(tokenizer: Any) -> None:
    around(tokenizer, "<s> $A </s>")
    tokenizer.chat_template = "{{ bos_token }}[{{ messages[0]['content'] }}]"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")[0]) == "<s>[hi]"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", raw=True)[0]) == "<s>hi"


LOOP = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0]['content'] }}", "S hi"),
        (LOOP, "S hi"),
        (f"USER {LOOP} ASSISTANT", "USER S hi ASSISTANT"),  # holds the prompt's words without its content
        ("{{ messages[0]['content'][0]['text'] }}", "S hi"),
        ("{% if messages[0]['content'] is string %}{{ raise_exception('parts') }}{% endif %}" + LOOP, "S hi"),
        ("{{ messages[0]['content'] | upper }}", "S HI"),
        ("{{ messages[0]['content'] | tojson }}", '"S hi"'),
        ("{% if add_generation_prompt %}{{ messages[0]['content'] }}>{% endif %}", "S hi>"),
    ],
)
def test_the_prompt_is_in_the_form_that_the_template_prints(tokenizer: Any, template: str, text: str) -> None:
    tokenizer.chat_template = template
    assert render_chat(tokenizer, "S hi") == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('a system message is needed') }}",
            "refuses the prompt: a system message is needed",
        ),
        ("{% for m in messages %}\n{{ m", "does not parse, line 2"),
        ("{% endfor %}", "does not parse, line 1"),
        ("{{ nothing.at.all }}", "refuses the prompt"),
        ("{{ 1 / 0 }}", "refuses the prompt: division by zero"),
        ("{% include 'other' %}", "refuses the prompt"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the prompt: maximum recursion"),
        ("hello", "leaves the prompt out"),
        ("{# nothing #}", "leaves the prompt out"),
        ({"rag": "x", "tool_use": "y"}, r"several chat templates \(rag, tool_use\) and none"),
        ({"default": "{{ m"}, "does not parse"),
    ],
)
def test_a_template_that_fails_is_an_error_with_a_way_around_it(
    tokenizer: Any, template: Any, message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message) as caught:
        encode_prompt(tokenizer, "hi")
    assert "--raw" in (caught.value.hint or "")
    assert encode_prompt(tokenizer, "hi", raw=True).shape[1] > 0


def test_a_template_of_several_is_the_default_one(tokenizer: Any) -> None:
    tokenizer.chat_template = {"rag": "x", "default": "[{{ messages[0]['content'] }}]"}
    assert render_chat(tokenizer, "hi") == "[hi]"


def test_a_tokenizer_whose_template_makes_no_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = "x"
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda self, messages, **options: [1, 2])
    with pytest.raises(ConfigError, match="returns a list, not a text"):
        encode_prompt(tokenizer, "hi")


def test_a_template_that_does_not_end_is_stopped(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages }}"
    )
    with pytest.raises(ConfigError, match="the chat template was stopped") as caught:
        encode_prompt(tokenizer, "hello")
    assert "--raw" in (caught.value.hint or "")
