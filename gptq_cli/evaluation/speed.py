"""Prompt and decode speed of a model, measured the same way for a packed and for a dense one.

Token ids are drawn from a local generator: speed does not depend on their values. One round is a prompt and
then single tokens with its cache; the first round is a warm-up and does not count. The result is the median
of the rounds, its spread the distance between their quartiles.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gptq_cli.devices.accelerators import synchronize
from gptq_cli.errors import CheckpointError
from gptq_cli.fields import check_int
from gptq_cli.model.running import cache_name, input_device, matmul_scope_of
from gptq_cli.results.load import Rate, Speed

OnRound = Callable[[int, int], None]
"""Called with (rounds done, rounds in all)."""


def measure_speed(
    model: Any,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    rounds: int = 5,
    on_round: OnRound = lambda done, total: None,
) -> Speed:
    """Time `rounds` rounds of a prompt of `prompt_tokens` and `new_tokens` single tokens.

    Raises `CheckpointError` where the model keeps no cache.
    """
    check_int("prompt_tokens", prompt_tokens, 1)
    check_int("new_tokens", new_tokens, 1)
    check_int("rounds", rounds, 1)
    device = input_device(model)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator).to(device)
    prompt_rates: list[float] = []
    decode_rates: list[float] = []
    with torch.inference_mode(), matmul_scope_of(model):
        for number in range(rounds + 1):
            prompt_seconds, decode_seconds = _one_round(model, ids, new_tokens, device)
            if number:
                prompt_rates.append(prompt_tokens / prompt_seconds)
                decode_rates.append(new_tokens / decode_seconds)
            on_round(number, rounds)
    return Speed(
        prompt=_rate(prompt_rates),
        decode=_rate(decode_rates),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
    )


def _one_round(model: Any, ids: torch.Tensor, new_tokens: int, device: torch.device) -> tuple[float, float]:
    takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if takes_keep else {}
    name = cache_name(model)
    started = _now(device)
    out = model(input_ids=ids, use_cache=True, **last_only)
    prompt_done = _now(device)
    token = ids[:, -1:]
    for _ in range(new_tokens):
        kept = getattr(out, name or "", None)
        if name is None or kept is None:
            raise CheckpointError(
                f"{type(model).__name__} keeps no cache of earlier tokens, so it has no speed of decoding",
                hint="leave --bench out",
            )
        out = model(input_ids=token, use_cache=True, **{name: kept})
        token = out.logits[:, -1:].argmax(-1)
    return prompt_done - started, _now(device) - prompt_done


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _rate(rates: list[float]) -> Rate:
    if len(rates) == 1:
        return Rate(rates[0], 0.0)
    quartiles = statistics.quantiles(rates, n=4, method="inclusive")
    return Rate(statistics.median(rates), quartiles[2] - quartiles[0])
