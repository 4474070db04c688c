"""Which tokens of conversations are answers, and windows to measure them on.

A chat model is used for its answers; what the user says is only what they follow from. A measurement on
conversations therefore counts the answers' tokens, and each window begins where a conversation begins, so
that no answer is without its question. Conversations that fit are put into a window whole; one that is longer
than a window is cut at its end, and left out where no answer begins before that. Room that is left is filled
with a token that does not count.

Where an answer stands, the chat template itself says: it writes the conversation again with another text in
the answer's place, and what differs is the answer. Looking for its words would find a short one in the
template's own: the answer "a" in `<|im_start|>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_cli.calibration.conversations import PROBE
from gptq_cli.calibration.documents import Documents, Piece
from gptq_cli.calibration.rows import Render, has_answer, row_text
from gptq_cli.errors import CalibrationError


@dataclass(frozen=True, slots=True, eq=False)
class AnswerWindows:
    """Windows of conversations."""

    input_ids: Tensor
    """(windows, seq_len) int64."""
    counts: Tensor
    """(windows, seq_len) bool: True for tokens of answers."""
    left_out: int
    """Conversations that were read and have no answer within a window."""
    too_long: int
    """Those of more characters than a piece, whose answers are not looked for."""


def conversation_windows(
    tokenizer: Any, documents: Documents, seq_len: int, windows: int, render: Render
) -> AnswerWindows | None:
    """At most `windows` windows of the conversations that `render` wrote.

    None where they hold no answer, or where the tokenizer does not say which characters a token stands for.
    Raises `CalibrationError` where there are answers, and none begins within a window.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    filler = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    made: list[tuple[list[int], list[bool]]] = []
    ids: list[int] = []
    counts: list[bool] = []
    late: list[int] = []  # tokens of those that have no answer within a window
    too_long = 0
    for piece in documents.pieces:
        too_long += piece.too_long
        if piece.messages is None:
            continue
        spans = answer_spans(piece.text, piece.messages, render, documents.label)
        own, own_counts = _tokens(tokenizer, piece, spans)
        if not any(own_counts[1:seq_len]):  # no token foretells the first
            late += [len(own)] if any(own_counts[seq_len:]) else []
            continue
        if ids and len(ids) + len(own) > seq_len:
            made.append((ids, counts))
            ids, counts = [], []
        ids, counts = (ids + own)[:seq_len], (counts + own_counts)[:seq_len]
        if len(made) == windows:
            break
    made = [*made, (ids, counts)][:windows] if ids else made
    if not made and late:
        raise CalibrationError(
            f"{documents.label} has no answer within {seq_len} tokens: its shortest conversation with an "
            f"answer has {min(late)}",
            hint=f"take longer windows: gptq load DIR --eval SOURCE --seq-len {min(late)}",
        )
    if not made:
        return None
    return AnswerWindows(
        torch.tensor([ids + [filler] * (seq_len - len(ids)) for ids, _ in made], dtype=torch.int64),
        torch.tensor([counts + [False] * (seq_len - len(counts)) for _, counts in made]),
        len(late),
        too_long,
    )


def answer_spans(
    text: str, messages: Sequence[Mapping[str, Any]], render: Render, name: str
) -> tuple[tuple[int, int], ...]:
    """Where the answers among `messages` stand in the text that `render` made of them, in characters.

    An answer that the template leaves out or writes otherwise (in capitals) is not found, and does not count.
    Raises `CalibrationError`, which names the source, where the template fails.
    """
    found: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if not has_answer([message]):
            continue
        probed = [*messages[:index], {**message, "content": PROBE}, *messages[index + 1 :]]
        other = row_text(probed, name, render)
        if other.count(PROBE) != 1:
            continue
        before, _, behind = other.partition(PROBE)
        begin = _alike(text, before)
        end = len(text) - _alike(text[begin:][::-1], behind[::-1])
        if begin < end:
            found.append((begin, end))
    return tuple(found)


def _alike(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _tokens(tokenizer: Any, piece: Piece, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which are an answer's; the token that ends an answer is one of it."""
    encoded = tokenizer(
        piece.text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = [int(token) for token in encoded["input_ids"]]
    inside = [
        any(begin < last and first < end for begin, end in spans) for first, last in encoded["offset_mapping"]
    ]
    special = set(tokenizer.all_special_ids)
    ends = [before and token in special for before, token in zip(inside, ids[1:], strict=False)]
    return ids, [one or end for one, end in zip(inside, [False, *ends], strict=True)]
