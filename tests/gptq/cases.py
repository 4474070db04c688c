"""Inputs that look like a language model's: correlated, with a few loud features. Seeded."""

from __future__ import annotations

import torch
from torch import Tensor


def activations(tokens: int, K: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(tokens, K): a low-rank part that all features share, noise, and loudness over a decade and a half."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = max(1, K // 4)
    shared = normal(tokens, rank) @ normal(rank, K) / rank**0.5
    loudness = torch.exp(0.8 * normal(K))
    return ((shared + 0.3 * normal(tokens, K)) * loudness).to(dtype)


def weights(N: int, K: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """(N, K): heavier tails than a Gaussian's."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=generator, dtype=torch.float64)
    return (0.02 * W * torch.exp(0.3 * torch.randn(N, K, generator=generator, dtype=torch.float64))).to(dtype)
