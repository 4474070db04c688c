"""Conversations of calibration text, written by the model's chat template with their contents in its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptq_cli.calibration.chat import chat_text
from gptq_cli.errors import ModelError

PROBE = "qzjxkv"
"""A text that no template holds by itself."""


class Conversations:
    """A call writes a conversation as the chat template does, with contents in the form that it prints.

    Most templates take a text as a message's content, some a list of parts; given the other form, they may
    print everything but the content, without an error. The first conversation shows which it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._as_parts: bool | None = None
        """None: no conversation has shown it yet."""

    def __call__(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool = False) -> str:
        """The text of a conversation; `answer_follows`: up to where the model's answer to it begins.

        Raises what `chat_text` raises, and `ModelError` where no content is printed.
        """
        if self._as_parts is None and any(message.get("content") for message in messages):
            self._as_parts = self._printed_as_parts(messages)
        return self._text(messages, as_parts=bool(self._as_parts), answer_follows=answer_follows)

    def _printed_as_parts(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        probes = [{**m, "content": PROBE if m.get("content") else m.get("content")} for m in messages]
        different: list[bool] = []
        errors: list[Exception] = []
        for as_parts in (False, True):
            try:
                probe = self._text(probes, as_parts=as_parts)
                text = self._text(messages, as_parts=as_parts)
            except (ModelError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001  # a template is the model author's program
                errors.append(error)
                continue
            if PROBE in probe:
                return as_parts
            if probe != text:  # it prints something else for another text: in capitals, as JSON
                different.append(as_parts)
        if different:
            return different[0]
        if errors:
            raise errors[0]
        raise ModelError("it leaves the contents of the messages out of what it prints")

    def _text(
        self, messages: Sequence[Mapping[str, Any]], *, as_parts: bool, answer_follows: bool = False
    ) -> str:
        if as_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m.get("content") or ""}]} for m in messages
            ]
        return chat_text(self._tokenizer, messages, add_generation_prompt=answer_follows)
