"""How far a quantized model is from the dense one it was made of: KL divergence and top-1 agreement.

Perplexity compares both models with a text; these compare them with each other, token by token, and see
differences that perplexity averages away. KL(dense ‖ quantized) is the mean over tokens, in nats.

Both models answer the same window; of the logits, only some rows are held as float32 log-probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptq_cli.errors import CheckpointError, NonFinite
from gptq_cli.inference.generation import input_device, products_of
from gptq_cli.inference.perplexity import OnWindow, row_ranges
from gptq_cli.proof import Agreement


def check_comparable(quantized: Any, dense: Any) -> None:
    """Raise `CheckpointError` unless both predict the same tokens; skeletons will do."""
    ours, theirs = (_vocabulary(model) for model in (quantized, dense))
    if ours != theirs:
        raise _not_comparable(ours, theirs)


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _not_comparable(ours: int, theirs: int) -> CheckpointError:
    return CheckpointError(
        f"the quantized model knows {ours} tokens, the dense one {theirs}",
        hint="compare with the model that the checkpoint was made of",
    )


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
                raise _not_comparable(ours.shape[1], theirs.shape[1])
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
    with products_of(model):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    assert isinstance(logits, Tensor)
    return logits
