"""How well a model predicts a text: exp of the mean negative log-likelihood over all predicted tokens.

Every window is scored separately: its first token is context only, the others are predicted. Logits become
log-probabilities in float32, some rows at a time: for a vocabulary of 150 000 a window of them takes
gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_cli.errors import NonFinite
from gptq_cli.model.running import input_device, matmul_scope_of

LOGIT_ELEMENTS = 1 << 24
"""float32 logits in memory at once: 64 MiB."""
OnWindow = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The perplexity of a text, and the number of predicted tokens it is the mean over."""

    value: float
    tokens: int
    windows: int


def perplexity(
    model: Any,
    windows: Tensor,  # (count, length) int64
    on_window: OnWindow = lambda done, total: None,
    *,
    answers: Tensor | None = None,  # (count, length) bool
) -> Perplexity:
    """Perplexity of `windows`; with `answers`, of these tokens alone. Raises `NonFinite` when a logit is
    NaN."""
    total_loss, tokens = 0.0, 0
    device = input_device(model)
    with torch.inference_mode():
        for index, window in enumerate(windows):
            ids = window.to(device).unsqueeze(0)
            with matmul_scope_of(model):
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            targets = ids[0, 1:]
            if answers is not None:
                counted = answers[index, 1:].to(device)
                logits, targets = logits[counted.to(logits.device)], targets[counted]
            total_loss += negative_log_likelihood(logits, targets)
            tokens += len(targets)
            if not math.isfinite(total_loss):
                raise NonFinite(
                    f"the model's output for window {index} is not finite",
                    hint="float16 may overflow: try --dtype bfloat16",
                )
            on_window(index + 1, len(windows))
    return Perplexity(math.exp(min(total_loss / tokens, 700.0)), tokens, len(windows))


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:  # (T, V), (T,)
    """Sum over T of -log softmax(logits)[target], in float32, summed in float64."""
    total = 0.0
    for start, stop in row_ranges(logits):
        wanted = targets[start:stop].to(logits.device)
        losses = torch.nn.functional.cross_entropy(logits[start:stop].float(), wanted, reduction="none")
        total += float(losses.double().sum())
    return total


def row_ranges(logits: Tensor) -> Iterator[tuple[int, int]]:  # (T, V)
    """Ranges of rows that fit into LOGIT_ELEMENTS."""
    rows = max(1, LOGIT_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        yield start, min(start + rows, logits.shape[0])
