"""From a prompt to token ids that end where the model should continue.

Where the tokenizer has a chat template, the prompt goes through it. A template is the model author's program,
written for a message whose content is a text, or for one whose content is a list of parts; a probe text shows
which of the two it prints. Whatever the template raises is an error of the request, because `--raw` avoids
it. Without a template the text itself is encoded, with the tokens that the tokenizer puts before a text
(begin of text) and without those that it puts after one (end of text, separator).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptq_cli.calibration.chat import chat_text
from gptq_cli.errors import ConfigError, ModelError
from gptq_cli.wording import first_line

_PROBE = "qzjxkv"
"""A text that does not occur in any template."""
_WITHOUT = "continue the prompt as it stands, without the template: --raw"


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool = False) -> Tensor:
    """Token ids (1, T) int64: through the chat template where the tokenizer has one, unless `raw`.

    Raises `ConfigError` where the template fails, is not a template or leaves the prompt out, and where the
    prompt gives no token.
    """
    chat = not raw and bool(getattr(tokenizer, "chat_template", None))
    text = render_chat(tokenizer, prompt) if chat else prompt
    ids = _encode(tokenizer, text)
    if not chat:
        before = _tokens_before_a_text(tokenizer)
        if ids[: len(before)] != before:  # a prompt may already contain its begin token
            ids = before + ids
    if not ids:
        raise ConfigError("the prompt holds no tokens", hint="give --prompt some text")
    return torch.tensor([ids], dtype=torch.int64)


def render_chat(tokenizer: Any, prompt: str) -> str:
    """A conversation of one message, up to the start of the answer. Raises `ConfigError`."""
    _refuse_no_default(tokenizer)
    errors: list[Exception] = []
    printed: list[str] = []
    for as_parts in (False, True):
        try:
            probe = _apply(tokenizer, _PROBE, as_parts)
            text = _apply(tokenizer, prompt, as_parts)
        except MemoryError:
            raise
        except ModelError as error:  # it was stopped, and would be again with the other content
            raise ConfigError(error.message, hint=_WITHOUT) from error
        except Exception as error:  # noqa: BLE001  # a template is the model author's program
            errors.append(error)
            continue
        if _PROBE in probe:
            return text
        if text != probe:  # the output depends on the text, but changes it: to capitals, to JSON
            printed.append(text)
    if printed:
        return printed[0]
    if errors:
        raise _refused(errors[0]) from errors[0]
    raise ConfigError("the chat template leaves the prompt out of what it prints", hint=_WITHOUT)


def _apply(tokenizer: Any, prompt: str, as_parts: bool) -> str:
    content = [{"type": "text", "text": prompt}] if as_parts else prompt
    messages = [{"role": "user", "content": content}]
    return chat_text(tokenizer, messages, add_generation_prompt=True)


def _refuse_no_default(tokenizer: Any) -> None:
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(str(name) for name in templates))
        raise ConfigError(
            f"the tokenizer has several chat templates ({names}) and none of them is called 'default'",
            hint=f"{_WITHOUT}; or name one of them 'default' in the tokenizer's files",
        )


def _refused(error: Exception) -> ConfigError:
    reason = first_line(error)
    line = getattr(error, "lineno", None)
    if line is not None:  # jinja2.TemplateSyntaxError
        return ConfigError(f"the chat template does not parse, line {line}: {reason}", hint=_WITHOUT)
    return ConfigError(f"the chat template refuses the prompt: {reason}", hint=_WITHOUT)


def _encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    ids = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    return [int(token) for token in ids]


def _tokens_before_a_text(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text, without those that it puts after one."""
    bare = _encode(tokenizer, "a")
    whole = _encode(tokenizer, "a", special=True)
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []
