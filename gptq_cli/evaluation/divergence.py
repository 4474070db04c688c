"""How far a quantized model is from the dense one it was made from: KL divergence and top-1 agreement.

Perplexity compares each model with a text. These measures compare the models with each other, token by token,
and show differences that perplexity averages out. KL(dense ‖ quantized) is the mean over tokens, in nats.

Both models run on the same windows; float32 log-probabilities are computed for some rows of logits at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.errors import CheckpointError, ModelError, NonFinite
from gptq_cli.evaluation.perplexity import OnWindow, row_ranges
from gptq_cli.gptq.tuning import divergence
from gptq_cli.model.blocks import find_blocks
from gptq_cli.model.running import input_device, matmul_scope_of
from gptq_cli.model.text_part import language_model
from gptq_cli.results.load import Agreement
from gptq_cli.wording import number_of


def check_comparable(quantized: Any, dense: Any) -> None:
    """Raise `CheckpointError`, naming both values, unless one can be a quantized copy of the other.

    Compared are architecture, blocks, hidden size, vocabulary, and the shapes of the blocks' parameters:
    figures of models that differ in these mean nothing. Both are skeletons with their linears still dense.
    """
    differences = list(_differences(quantized, dense))
    if differences:
        raise _not_comparable("; ".join(differences))


def _differences(quantized: Any, dense: Any) -> Iterator[str]:
    ours, theirs = _config(quantized), _config(dense)
    if ours.model_type != theirs.model_type:
        yield f"the quantized model is a {ours.model_type}, the dense one a {theirs.model_type}"
    blocks, others = _blocks(quantized), _blocks(dense)
    if len(blocks) != len(others):
        yield f"the quantized model has {number_of(len(blocks), 'block')}, the dense one {len(others)}"
    embeddings = [language_model(model).get_input_embeddings() for model in (quantized, dense)]
    width, other = (embedding.embedding_dim for embedding in embeddings)
    if width != other:
        yield f"the quantized model has hidden size {width}, the dense one {other}"
    tokens, known = (int(embedding.num_embeddings) for embedding in embeddings)
    if tokens != known:
        yield _other_tokens(tokens, known)
    if (ours.model_type, len(blocks), width) == (theirs.model_type, len(others), other):
        pairs = zip(blocks, others, strict=True)
        yield from islice((text for pair in pairs for text in _block_difference(*pair)), 1)


def _block_difference(block: nn.Module, other: nn.Module) -> Iterator[str]:
    ours = {name: tuple(p.shape) for name, p in block.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in other.named_parameters()}
    for name in ours:
        if name in theirs and ours[name] != theirs[name]:
            found, wanted = list(ours[name]), list(theirs[name])
            yield f"{name} is {found} in a block of the quantized model, {wanted} in the dense one"
    # what only one has: biases, norms
    for name in sorted(ours.keys() ^ theirs.keys()):
        which, neither = ("quantized", "dense") if name in ours else ("dense", "quantized")
        yield f"a block of the {which} model has {name}, none of the {neither} one"


def _config(model: Any) -> Any:
    return model.config.get_text_config()


def _blocks(model: Any) -> list[nn.Module]:
    try:
        return [model.get_submodule(name) for name in find_blocks(model)[1]]
    except ModelError:
        return []


def _other_tokens(ours: int, theirs: int) -> str:
    return f"the quantized model knows {ours} tokens, the dense one {theirs}"


def _not_comparable(why: str) -> CheckpointError:
    return CheckpointError(why, hint="compare with the model that the checkpoint was made of")


def compare(
    quantized: Any,
    dense: Any,
    windows: Tensor,  # (count, length) int64
    on_window: OnWindow = lambda done, total: None,
    *,
    answers: Tensor | None = None,  # (count, length) bool
) -> Agreement:
    """Run both models over `windows` and compare what they predict; with `answers`, of these tokens alone.

    Raises `NonFinite`, `CheckpointError`.
    """
    kl = agreed = loss = dense_loss = 0.0
    tokens = predicted = 0
    with torch.inference_mode():
        for index, window in enumerate(windows):
            theirs = _logits(dense, window)
            ours = _logits(quantized, window).to(theirs.device)
            if ours.shape != theirs.shape:
                raise _not_comparable(_other_tokens(ours.shape[1], theirs.shape[1]))
            targets = window[1:].to(theirs.device)
            if answers is not None:
                counted = answers[index, 1:].to(theirs.device)
                theirs, ours, targets = theirs[:-1][counted], ours[:-1][counted], targets[counted]
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


def mean_divergence(
    dense: Tensor,  # (T, V) logits
    other: Tensor,  # (T, V)
) -> float:
    """The mean over T of KL(dense ‖ other), in nats; float32 for some rows at a time."""
    total = 0.0
    for start, stop in row_ranges(dense):
        total += float(divergence(other[start:stop], dense[start:stop]))
    return total / dense.shape[0]


def _logits(model: Any, window: Tensor) -> Tensor:  # (T, V)
    ids = window.to(input_device(model)).unsqueeze(0)
    with matmul_scope_of(model):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    assert isinstance(logits, Tensor)
    return logits
