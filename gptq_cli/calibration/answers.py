"""Which tokens of conversations are answers, and windows to measure them on.

A chat model is used for its answers; what the user says is only what they follow from. A measurement on
conversations therefore counts the answers' tokens, and each window begins where a conversation begins, so
that no answer is without its question. Conversations that fit are put into a window whole; one that is longer
than a window is cut at its end. Room that is left is filled with a token that does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gptq_cli.calibration.documents import Piece


def conversation_windows(
    tokenizer: Any, pieces: Iterable[Piece], seq_len: int, windows: int
) -> tuple[Tensor, Tensor] | None:
    """At most `windows` windows of conversations: (windows, seq_len) ids, and where they count.

    None where no answer is found, or where the tokenizer does not say which characters a token stands for.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    filler = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    made: list[tuple[list[int], list[bool]]] = []
    ids: list[int] = []
    counts: list[bool] = []
    for piece in pieces:
        own, own_counts = _tokens(tokenizer, piece)
        if ids and len(ids) + len(own) > seq_len:
            made.append((ids, counts))
            ids, counts = [], []
        if any(own_counts[:seq_len]):
            ids, counts = (ids + own)[:seq_len], (counts + own_counts)[:seq_len]
        if len(made) == windows:
            break
    made = [*made, (ids, counts)][:windows]
    made = [(ids, counts) for ids, counts in made if any(counts[1:])]
    if not made:
        return None
    return (
        torch.tensor([ids + [filler] * (seq_len - len(ids)) for ids, _ in made], dtype=torch.int64),
        torch.tensor([counts + [False] * (seq_len - len(counts)) for _, counts in made]),
    )


def _tokens(tokenizer: Any, piece: Piece) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which are an answer's; the token that ends an answer is one of it."""
    encoded = tokenizer(
        piece.text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = [int(token) for token in encoded["input_ids"]]
    spans = piece.answers or ()
    inside = [
        any(begin < last and first < end for begin, end in spans) for first, last in encoded["offset_mapping"]
    ]
    special = set(tokenizer.all_special_ids)
    ends = [before and token in special for before, token in zip(inside, ids[1:], strict=False)]
    return ids, [one or end for one, end in zip(inside, [False, *ends], strict=True)]
