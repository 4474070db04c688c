"""The pool: what linears that share the tokens of a block know together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.gptq.moments import StageMoments
from gptq_cli.gptq.pool import Pool, shrink_to_pooled
from tests.gptq.cases import activations

K, CPU = 16, torch.device("cpu")


def tokens() -> Tensor:  # (samples, tokens, K)
    return activations(10 * 24, K, dtype=torch.float32).view(10, 24, K)


def moments_of(parts: list[Tensor]) -> list[StageMoments]:
    moments = [StageMoments(K, CPU, samples=0, dense=False) for _ in parts]
    for moment, part in zip(moments, parts, strict=True):
        if len(part):
            moment.add(part, None, 0)
    return moments


def test_the_pool_is_the_hessian_of_all_tokens() -> None:
    quant = tokens()
    parts = [quant[:6], quant[6:7], quant[:0]]
    shrunk = shrink_to_pooled(moments_of(parts), Pool())
    flat = quant[:7].reshape(-1, K)
    pool = flat.T @ flat / len(flat)
    torch.testing.assert_close(shrunk[2], pool, rtol=1e-4, atol=1e-5)
    own = [part.reshape(-1, K) for part in parts[:2]]
    for H, x in zip(shrunk, own, strict=False):
        torch.testing.assert_close(H, (x.T @ x + K * pool) / (len(x) + K), rtol=1e-4, atol=1e-5)


def test_alone_or_without_a_token_nothing_shrinks() -> None:
    quant = tokens()
    alone, empty = (StageMoments(K, CPU, samples=0, dense=False) for _ in range(2))
    alone.add(quant, None, 0)
    (H,) = shrink_to_pooled([alone], Pool())
    flat = quant.reshape(-1, K)
    torch.testing.assert_close(H, flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5)
    assert torch.equal(shrink_to_pooled([empty], Pool())[0], torch.zeros(K, K))


def test_the_pool_grows_from_batch_to_batch() -> None:
    quant, pool = tokens(), Pool()
    shrink_to_pooled(moments_of([quant[:6], quant[:0]]), pool)
    (later,) = shrink_to_pooled(moments_of([quant[6:7]]), pool)
    flat, own = quant[:7].reshape(-1, K), quant[6:7].reshape(-1, K)
    whole = flat.T @ flat / len(flat)
    torch.testing.assert_close(pool.hessian(), whole, rtol=1e-4, atol=1e-5)
    assert pool.tokens == len(flat)
    torch.testing.assert_close(later, (own.T @ own + K * whole) / (len(own) + K), rtol=1e-4, atol=1e-5)


def test_an_empty_pool_has_no_hessian() -> None:
    with pytest.raises(ValueError, match="empty pool"):
        Pool().hessian()
