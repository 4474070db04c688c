"""The maths of tuning: gradients, Adam, what is stored, and that only what helps is taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gptq_cli.gptq import tuning
from gptq_cli.gptq.tuning import FARTHEST, Moving, best_part, divergence, rate_at, scale_gradient

N, K, GROUP = 5, 24, 8


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("order", ["in place", "desc_act", "ragged"])
def test_the_gradient_of_the_scales_is_autograds(order: str) -> None:
    g_idx = torch.arange(K, dtype=torch.int32) // (9 if order == "ragged" else GROUP)
    if order == "desc_act":
        g_idx = g_idx[torch.randperm(K, generator=torch.Generator().manual_seed(3))]
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(6, 10, (N, 3), dtype=torch.uint8, generator=generator)
    scales = numbers(3, N, seed=2).requires_grad_()
    levels = codes.float() - zeros.float()[:, g_idx.long()]
    W = levels * scales.T[:, g_idx.long()]
    gradient = numbers(N, K, seed=4)
    (want,) = torch.autograd.grad(W, scales, gradient)
    torch.testing.assert_close(scale_gradient(gradient, codes, zeros, g_idx), want, rtol=1e-5, atol=1e-5)


def test_a_step_is_adams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the paper's, as torch has it, on what a number moves in its size."""
    monkeypatch.setattr(tuning, "RATE", 0.02 * 2.0**4)  # at 4 bits
    start = numbers(4, 6)
    moving = Moving.vector(start, bits=4)
    size = start.square().mean().sqrt()
    delta = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=0.02, betas=tuning._BETAS, eps=tuning._EPSILON)
    for step in range(4):
        gradient = numbers(4, 6, seed=10 + step)
        moving.step(gradient, 1.0)
        delta.grad = gradient * size
        adam.step()
    torch.testing.assert_close(moving.value(), start + size * delta.detach())
    torch.testing.assert_close(moving.value(0.5), start + 0.5 * size * delta.detach())
    assert moving.value(0.0) is start


def test_scales_stay_what_a_file_can_hold() -> None:
    start = torch.tensor([[0.5, -0.25, 2.0**-24, 60000.0]], dtype=torch.float16)
    moving = Moving.scales(start, bits=2)
    for _ in range(1000):
        moving.step(torch.tensor([[1.0, 1.0, 1.0, -1.0]]), 1.0)
    assert moving.value().dtype == torch.float16
    found = moving.value().tolist()[0]
    # each as far as it may: towards 0, away from 0, no smaller than fp16 can be, no larger
    assert found == [0.5 * (1 - FARTHEST), -0.25 * (1 + FARTHEST), 2.0**-24, 65504.0]


def test_a_gradient_that_is_not_finite_counts_as_none() -> None:
    moving = Moving.vector(torch.ones(3), bits=4)
    moving.step(torch.tensor([1.0, math.nan, 1.0]), 1.0)
    assert torch.equal(moving.value(), torch.ones(3))
    moving.step(torch.ones(3), 1.0)
    assert bool((moving.value() < 1).all())


def test_coarser_codes_move_farther() -> None:
    moved = []
    for bits in (2, 4, 8):
        moving = Moving.scales(torch.ones(1, 2, dtype=torch.float16), bits)
        for _ in range(50):
            moving.step(torch.ones(1, 2), 1.0)
        moved.append(float(1 - moving.value()[0, 0]))
    assert moved[0] > moved[1] > moved[2] > 0


def test_divergence_is_kl_of_the_quantized_from_the_dense() -> None:
    logits, goal = numbers(3, 7), numbers(3, 7, seed=1)
    p, q = goal.double().softmax(-1), logits.double().softmax(-1)
    assert float(divergence(logits, goal)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    x = goal.clone().requires_grad_()
    loss = divergence(x, goal)
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(gradient.abs().max()) < 1e-6


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 40) for step in range(40)]
    assert max(rates) <= 1.0
    assert rates.index(max(rates)) == 3
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert rate_at(0, 1) == 1.0


@pytest.mark.parametrize(
    ("losses", "part", "after"),
    [
        ({1.0: 0.8, 0.5: 0.9}, 1.0, 0.8),
        ({1.0: 1.2, 0.5: 0.95}, 0.5, 0.95),
        ({1.0: 1.2, 0.5: 1.01}, 0.0, 1.0),
        ({1.0: math.nan, 0.5: math.inf}, 0.0, 1.0),
        ({1.0: 0.9999, 0.5: 0.9995}, 0.0, 1.0),  # too little
    ],
)
def test_the_way_is_gone_as_far_as_held_out_samples_bear_it_out(
    losses: dict[float, float], part: float, after: float
) -> None:
    assert best_part(losses.__getitem__, 1.0) == (part, after)
