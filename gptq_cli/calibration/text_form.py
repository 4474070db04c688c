"""The form of the texts that a model writes: how each begins and ends, in tokens.

A model with a chat template gets requests through it, as it does in use; its answer ends with the tokens that
the template puts after one. A base model continues: after its begin-of-text token (or the end-of-text token
that stood between two documents when it was trained), and every second time an opening of ours, for variety.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gptq_cli.calibration.conversations import PROBE, Conversations
from gptq_cli.calibration.prompts import Prompts
from gptq_cli.errors import CalibrationError
from gptq_cli.wording import first_line

_PLACEHOLDER = re.compile(r"(image|video|audio|vision|speech|img|boi|eoi|boa|eoa)\w*_token_(id|index)$")
_HINT = "calibrate on a text instead: --calibration pydoc, or a file"


@dataclass(frozen=True, slots=True)
class TextForm:
    """How the texts of one model begin and end."""

    beginnings: tuple[tuple[int, ...], ...]
    """What stands before the model's own words, in the order of use; none is empty."""
    closing: tuple[int, ...]
    """What follows an answer; its first token is one that the model ends with. Empty: it never ends."""
    ends: frozenset[int]
    """Tokens with which the model ends an answer."""
    forbidden: tuple[int, ...]
    """Tokens that it must not write: places for images and sounds, padding."""
    vocabulary: int
    """Ids from here on are no tokens."""


def text_form(tokenizer: Any, model: Any, prompts: Prompts, seed: int) -> TextForm:
    """The form for `model`; its weights may be on the meta device. Raises `CalibrationError`."""
    known = len(tokenizer)
    vocabulary = min(known, int(model.get_input_embeddings().num_embeddings))
    ends = frozenset(token for token in _ends(tokenizer, model) if token < vocabulary)
    if getattr(tokenizer, "chat_template", None):
        beginnings, closing = _conversations(tokenizer, prompts)
    else:
        beginnings, closing = _documents(tokenizer, prompts), ()
    if not closing or closing[0] not in ends:  # the template writes it otherwise, or not at all
        closing = tuple(sorted(ends)[:1])
    order = torch.randperm(len(beginnings), generator=torch.Generator().manual_seed(seed))
    largest = max(token for tokens in beginnings for token in tokens)
    if largest >= int(model.get_input_embeddings().num_embeddings):
        raise CalibrationError(
            f"the tokenizer makes token {largest}, but the model's embedding has "
            f"{model.get_input_embeddings().num_embeddings} rows",
            hint="the tokenizer belongs to another model; copy the model's own tokenizer files beside it",
        )
    return TextForm(
        beginnings=tuple(beginnings[index] for index in order.tolist()),
        closing=closing,
        ends=ends,
        forbidden=tuple(sorted(token for token in _forbidden(tokenizer, model) - ends if token < vocabulary)),
        vocabulary=vocabulary,
    )


def _conversations(tokenizer: Any, prompts: Prompts) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The requests as the template writes them up to the answer, and what it writes after an answer."""
    conversations = Conversations(tokenizer)
    try:
        texts = [
            conversations([{"role": "user", "content": request}], answer_follows=True)
            for request in prompts.requests
        ]
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        _, found, after = conversations(example).rpartition(PROBE)
    except MemoryError:
        raise
    except Exception as error:  # a template is the model author's program
        raise CalibrationError(
            f"the model's chat template refuses a request: {first_line(error)}", hint=_HINT
        ) from error
    beginnings = [tokens for text in texts if (tokens := _tokens(tokenizer, text))]
    if not beginnings:
        raise CalibrationError("the model's chat template makes no tokens of a request", hint=_HINT)
    return beginnings, _tokens(tokenizer, after) if found else ()


def _documents(tokenizer: Any, prompts: Prompts) -> list[tuple[int, ...]]:
    """Begin tokens, every second time with an opening; openings alone where there is no such token."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    openings = [tokens for text in prompts.openings if (tokens := _tokens(tokenizer, text))]
    if begin is None:
        if not openings:
            raise CalibrationError("the tokenizer makes no tokens of a text", hint=_HINT)
        return openings
    return [one for tokens in openings for one in ((begin,), (begin, *tokens))] or [(begin,)]


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return tuple(int(token) for token in ids)


def _ends(tokenizer: Any, model: Any) -> Iterator[int]:
    """What the generation config, or else the config, and the tokenizer call ends."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if own is not None else getattr(model.config.get_text_config(), "eos_token_id", None)
    for value in (own, tokenizer.eos_token_id):
        for token in value if isinstance(value, list | tuple) else (value,):
            if isinstance(token, int) and token >= 0:
                yield token


def _forbidden(tokenizer: Any, model: Any) -> set[int]:
    named = {int(t) for t in (tokenizer.pad_token_id, tokenizer.bos_token_id) if t is not None}
    return named | set(_placeholders(model.config.to_dict()))


def _placeholders(config: Any) -> Iterator[int]:
    """Ids of the tokens that stand for an image or a sound: a forward with one expects it."""
    if isinstance(config, dict):
        for key, value in config.items():
            if isinstance(value, int) and isinstance(key, str) and _PLACEHOLDER.search(key):
                yield value
            yield from _placeholders(value)
