"""The version of the maths is raised when the codes of a fixed input change."""

from __future__ import annotations

import hashlib

import pytest
import torch

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.gptq.version import MATHS_VERSION
from gptq_cli.recipes import RECIPES, Recipe

DIGESTS: dict[tuple[int, Recipe], str] = {
    (1, "fast"): "124830e0d66b6ef9",
    (1, "balanced"): "9a2bad409bd6d69c",
    (1, "best"): "782d7c3dbe5a6348",
    # 2: other goals where an output is normed before it is added, or attention and MLP run side by side
    (2, "fast"): "124830e0d66b6ef9",
    (2, "balanced"): "9a2bad409bd6d69c",
    (2, "best"): "782d7c3dbe5a6348",
    # 3: no row of a goal is farther from the weights than these are long
    (3, "fast"): "124830e0d66b6ef9",
    (3, "balanced"): "9a2bad409bd6d69c",
    (3, "best"): "782d7c3dbe5a6348",
    (3, "max"): "782d7c3dbe5a6348",
    # 4: of few tokens more are paired, labels for the gradients are drawn otherwise, A has bf16 products
    (4, "fast"): "124830e0d66b6ef9",
    (4, "balanced"): "9a2bad409bd6d69c",
    (4, "best"): "782d7c3dbe5a6348",
    (4, "max"): "782d7c3dbe5a6348",
    # 5: tuning takes smaller steps at 3 bits and more
    (5, "fast"): "124830e0d66b6ef9",
    (5, "balanced"): "9a2bad409bd6d69c",
    (5, "best"): "782d7c3dbe5a6348",
    (5, "max"): "782d7c3dbe5a6348",
    # 6: a token that all samples begin with counts for a quarter of the others
    (6, "fast"): "124830e0d66b6ef9",
    (6, "balanced"): "9a2bad409bd6d69c",
    (6, "best"): "782d7c3dbe5a6348",
    (6, "max"): "782d7c3dbe5a6348",
    # 7: gradients of 16-bit attention on the CPU, and its forward in float16, are computed in fp32
    (7, "fast"): "124830e0d66b6ef9",
    (7, "balanced"): "9a2bad409bd6d69c",
    (7, "best"): "782d7c3dbe5a6348",
    (7, "max"): "782d7c3dbe5a6348",
}
"""(maths version, recipe) -> digest of codes and scales. Where one differs because the maths changed: raise
`MATHS_VERSION`, so that no run goes on with blocks of the maths before, and put the new digests here."""


def digest_of(recipe: Recipe) -> str:
    """Of a problem so small and well conditioned that no code depends on how sums are rounded."""
    K, N = 32, 8
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(-8, 9, (4 * K, K), generator=generator).float() / 8
    x += x[:, :1] + x.roll(1, dims=1)  # columns that are correlated: each of them changes later ones
    weight = torch.randint(-64, 65, (N, K), generator=generator).float() / 64
    hessian = x.T @ x / len(x) + torch.eye(K)
    config = QuantizeConfig.of(recipe, group_size=16)
    (solved,) = quantize_linears([weight], hessian, config)
    return hashlib.sha256(solved.codes.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_of_a_fixed_input(recipe: Recipe) -> None:
    assert (MATHS_VERSION, recipe) in DIGESTS, "a new version: put its digests into this file"
    assert digest_of(recipe) == DIGESTS[MATHS_VERSION, recipe], (
        "the maths gives other codes: raise gptq_cli.gptq.version.MATHS_VERSION"
    )
