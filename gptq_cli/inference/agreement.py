"""How far a quantized model is from the dense one it was made of: KL divergence and top-1 agreement.

Perplexity compares both models with a text; these compare them with each other, token by token, and see
differences that perplexity averages away. KL(dense ‖ quantized) is the mean over tokens, in nats.

Both models answer the same window; of the logits, only some rows are held as float32 log-probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_cli.config import ModelRef
from gptq_cli.errors import CheckpointError, NonFinite
from gptq_cli.inference.generation import input_device
from gptq_cli.inference.perplexity import OnWindow, row_ranges
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.model.source import find_model
from gptq_cli.model.weights import load_resident
from gptq_cli.placement import Placement, PlacementEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Means over all tokens; perplexities over the predicted ones."""

    kl: float
    """KL(dense ‖ quantized), nats a token."""
    top1: float
    """Share of tokens for which both models predict the same next token, 0 to 1."""
    perplexity: float
    """Of the quantized model."""
    dense_perplexity: float
    tokens: int
    windows: int

    @property
    def perplexity_gap(self) -> float:
        """How much higher the quantized model's perplexity is, as a fraction of the dense model's."""
        return self.perplexity / self.dense_perplexity - 1


def open_dense(ref: ModelRef, placement: Placement) -> Any:
    """The dense model to compare with, on the main device of `placement`. Raises `ModelError`."""
    skeleton = open_skeleton(find_model(ref), ref)
    device = placement.main_device
    entry = PlacementEntry("", device, skeleton.files.size_bytes, True)
    return load_resident(skeleton, Placement((entry,), device, "beside the quantized model"))


def compare(
    quantized: Any,
    dense: Any,
    windows: Tensor,  # (count, length) int64
    on_window: OnWindow = lambda done, total: None,
) -> Agreement:
    """Run both models over `windows` and compare what they predict. Raises `NonFinite`, `CheckpointError`."""
    kl = agreed = loss = dense_loss = 0.0
    tokens = predicted = 0
    with torch.inference_mode():
        for index, window in enumerate(windows):
            theirs = _logits(dense, window)
            ours = _logits(quantized, window).to(theirs.device)
            if ours.shape != theirs.shape:
                raise CheckpointError(
                    f"the quantized model has {ours.shape[1]} output tokens, the dense one {theirs.shape[1]}",
                    hint="compare with the model that the checkpoint was made of",
                )
            targets = window[1:].to(theirs.device)
            for start, stop in row_ranges(ours):
                p = torch.log_softmax(theirs[start:stop].float(), -1)
                q = torch.log_softmax(ours[start:stop].float(), -1)
                kl += float((p.exp() * (p - q)).sum(-1).double().sum())
                agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
                wanted = targets[start:stop].unsqueeze(1)
                rows = wanted.shape[0]
                dense_loss -= float(p[:rows].gather(1, wanted).double().sum())
                loss -= float(q[:rows].gather(1, wanted).double().sum())
            tokens += ours.shape[0]
            predicted += len(targets)
            if not (math.isfinite(kl) and math.isfinite(loss) and math.isfinite(dense_loss)):
                raise NonFinite(
                    f"an output for window {index} is not finite",
                    hint="float16 may overflow: try --dtype bfloat16",
                )
            on_window(index + 1, len(windows))
    return Agreement(
        kl=max(0.0, kl / tokens),
        top1=agreed / tokens,
        perplexity=math.exp(min(loss / predicted, 700.0)),
        dense_perplexity=math.exp(min(dense_loss / predicted, 700.0)),
        tokens=tokens,
        windows=len(windows),
    )


def _logits(model: Any, window: Tensor) -> Tensor:  # (T, V)
    ids = window.to(input_device(model)).unsqueeze(0)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    assert isinstance(logits, Tensor)
    return logits
