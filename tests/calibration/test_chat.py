"""A chat template gives what Transformers gives, and ends in bounded time and memory whatever it says."""

# ruff: noqa: E501 - templates
from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from jinja2 import TemplateError, TemplateSyntaxError

from gptq_cli.calibration import chat, open_tokenizer
from gptq_cli.calibration.chat import CPU_SECONDS, SIZE, chat_text
from gptq_cli.errors import ModelError

MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is 2 + 2?\n\tSay it.", "name": None},
    {"role": "assistant", "content": "4", "thinking": "two and two", "tags": ["a", {"b": [1, 2.5, True]}]},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USUAL = [
    CHATML,
    "{{ bos_token }}{%- for m in messages -%}[{{ m.role | upper }}] {{ m['content'] | trim }}{{ eos_token }}{%- endfor -%}",
    "{% set ns = namespace(text='', last=-1) %}{% for m in messages %}{% set ns.text = ns.text + m.content ~ '|' ~ loop.index0 %}"
    "{% set ns.last = loop.index0 %}{% endfor %}{{ ns.text }}{{ ns.last }}{{ messages[::-1][0].role }}",
    "{% macro show(m, n=3) %}{{ '%s has %05.2f of %d' % (m.role, n, 20250101) }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ '{:>8}: {}'.format(m.role, m.content) }}{% if not loop.last %}{{ '-' * 40 }}{% endif %}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ messages | map(attribute='role') | join(', ') }}{{ messages | length }}",
    "{% for k, v in messages[2] | items %}{{ k }}={{ v }};{% endfor %}{{ ['a', 'b'] + ['c'] }}{{ {'x': (1, 2)} }}{{ (1, 2) }}",
    "{% generation %}{{ messages[-1].content.split('4') | list }}{% endgeneration %}{{ range(5) | list | sum }}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content | replace('e', '3') | indent(4) }}{% endfor %}",
    "{% if tools is none %}no tools{% endif %}{{ messages[2].reasoning_content }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ 3 * 4 }}",
    "{%- set parts = messages[1].content.split('\n') %}{{ parts[-1].lstrip() }}{{ 'ab'.center(9) }}{{ missing | default('none') }}",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x }}{% set a, b = 1, 2 %}{{ a ~ b ~ none ~ x }}",
]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return open_tokenizer(tiny_llama)


@pytest.mark.parametrize("template", USUAL)
@pytest.mark.parametrize("prompt", [False, True])
def test_it_is_what_transformers_gives(template: str, prompt: bool, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    assert chat_text(tokenizer, MESSAGES, add_generation_prompt=prompt) == expected


def test_several_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "plain {{ messages | length }}", "tool_use": "tools"}
    assert chat_text(tokenizer, MESSAGES) == "plain 3"


GROW = "{% set ns = namespace(a='x', b=[1]) %}{% for i in range(64) %}"
HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}x",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'yes' }}{% endfor %}{% endfor %}",
    "{% macro again(n) %}{% for i in range(99999) %}{{ again(n + 1) }}{% endfor %}{% endmacro %}"
    "{% for i in range(99999) %}{% for k in range(99999) %}{% set x = again %}{% endfor %}{% endfor %}",
    "{% for a in messages * 99999 %}{% for b in messages * 99999 %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for a in range(99999) %}{% set ns.n = ns.n + (range(99999) | sum) %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'x' }}",
    "{{ [messages] * 10 ** 10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ ('x\n' * 10 ** 6) | indent(10 ** 6) }}",
    "{{ 'x'.ljust(10 ** 10) }}",
    "{{ 'x'.zfill(10 ** 10) }}",
    "{{ ('\t' * 10 ** 6).expandtabs(10 ** 6) }}",
    "{{ ('x' * 10 ** 6).replace('x', 'y' * 10 ** 6) }}",
    "{{ ('x' * 10 ** 6) | replace('x', 'y' * 10 ** 6) }}",
    "{{ ('x' * 10 ** 6).join(['y'] * 10 ** 6) }}",
    "{{ (['y'] * 10 ** 6) | join('x' * 10 ** 6) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "{{ ('{0}' * 10 ** 5).format('x' * 10 ** 5) }}",
    "{{ (5).to_bytes(10 ** 10, 'big') }}",
    "{{ 1.5 | round(10 ** 9) }}",
    "{{ [1] | batch(10 ** 10, 'x') | list }}",
    GROW + "{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    GROW + "{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    GROW + "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.b }}",
    GROW + "{% set ns.b = {'a': ns.b, 'b': ns.b} %}{% endfor %}{{ ns.b | tojson }}",
    GROW + "{% set ns.b = (ns.b, ns.b) %}{% endfor %}{{ ns.b | string }}",
    GROW + "{% set ns.b = ns.b + ns.b %}{% endfor %}{{ ns.b }}",
    GROW + "{% set ns.b = dict(a=ns.b, b=ns.b) %}{% endfor %}{{ ns.b }}",
    GROW + "{% set ns.b = [ns.b] | batch(2, ns.b) | list %}{% endfor %}{{ ns.b }}",
    GROW + "{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}{% endfor %}{{ ns.a }}",
    "{% set a = 'x' * 10 ** 6 %}" + "{{ a }}" * 10_000,
    "{% set a = 'x' * 10 ** 6 %}{% set b = " + " ~ ".join(["a"] * 10_000) + " %}",
    "{% set a = 'x' * 3 * 10 ** 6 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [[a ~ i]] %}{% endfor %}",
    "{# " + "x" * 2_000_000 + " #}",
]


@pytest.mark.parametrize("template", HOSTILE, ids=[template[:60] for template in HOSTILE])
def test_it_ends(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    before = psutil.Process().memory_info().rss
    with pytest.raises(ModelError, match="the chat template") as caught:
        chat_text(tokenizer, MESSAGES)
    assert "template" in str(caught.value.hint)
    assert psutil.Process().memory_info().rss - before < 1 << 30


def test_what_handles_a_stop_is_not_stopped_itself(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is seen when the pieces are joined, outside the trace function, which therefore stays set."""
    monkeypatch.setattr(chat, "_LINES", 1 << 60)
    seconds = iter([0.0])

    def clock() -> float:
        now = next(seconds, 9.0)
        if now > 0:
            monkeypatch.setattr(chat, "_LINES", 1)
        return now

    monkeypatch.setattr(chat.time, "thread_time", clock)
    tokenizer.chat_template = "{% for a in range(99) %}{{ 'x' * 2000 }}{% endfor %}"
    with pytest.raises(ModelError, match="the chat template was stopped: it runs for more than 1 s"):
        chat_text(tokenizer, MESSAGES)


def test_it_ends_on_another_thread_and_leaves_no_trace_function(tokenizer: Any) -> None:
    import sys

    tokenizer.chat_template = HOSTILE[0]
    found: list[BaseException | object] = []

    def render() -> None:
        try:
            chat_text(tokenizer, MESSAGES)
        except ModelError as error:
            found.extend((error, sys.gettrace()))

    thread = threading.Thread(target=render)
    before = sys.gettrace()
    thread.start()
    thread.join()
    assert f"{CPU_SECONDS:g} s" in str(found[0])
    assert found[1] is None
    assert sys.gettrace() is before


def test_what_is_not_reached_does_no_harm(tokenizer: Any) -> None:
    """Jinja computes constant expressions while it compiles, reached or not."""
    tokenizer.chat_template = "{% if false %}{{ 'x' * 10 ** 10 }}{{ 'x' | center(10 ** 10) }}{% endif %}fine"
    assert chat_text(tokenizer, MESSAGES) == "fine"


def test_a_long_conversation_is_no_attack(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    messages = [{"role": "user", "content": "x" * (SIZE // 2)}] * 6
    assert len(chat_text(tokenizer, messages)) > 3 * SIZE


def test_what_the_template_raises_is_passed_on(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TemplateError, match="roles must alternate"):
        chat_text(tokenizer, MESSAGES)
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(TemplateSyntaxError):
        chat_text(tokenizer, MESSAGES)
