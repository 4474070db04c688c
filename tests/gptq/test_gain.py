"""What lies between a linear and a sum is found from values alone, and tokens count for what it leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gptq_cli.gptq.gain import Gain, find_gain
from gptq_cli.gptq.moments import StageMoments
from tests import reference
from tests.gptq.cases import activations, weights

K, N, SAMPLES, LENGTH = 24, 6, 8, 60
CPU = torch.device("cpu")
GAMMA = torch.tensor([1.5, -0.5, 1.0, 0.3, 2.0, 0.8])


def outputs(tokens: int = 16, seed: int = 3) -> Tensor:
    """Outputs of a linear whose tokens differ in size, as the first token of a text does from the others."""
    y = torch.randn(tokens, N, generator=torch.Generator().manual_seed(seed))
    return y * torch.linspace(0.1, 30.0, tokens)[:, None]


def normed(y: Tensor, eps: float = 1e-6) -> Tensor:
    return functional.rms_norm(y.float(), (N,), GAMMA, eps).to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_a_norm_is_found(dtype: torch.dtype, eps: float) -> None:
    y = outputs().to(dtype)
    gain = find_gain(y, normed(y, eps))
    assert gain is not None
    unseen = outputs(seed=4).to(dtype)
    z = gain.of_tokens(unseen) * gain.gamma * unseen.float()
    torch.testing.assert_close(z, normed(unseen, eps).float(), rtol=0.02, atol=0.01)


def test_a_factor_is_found() -> None:
    y = outputs().bfloat16()
    gain = find_gain(y, y * 0.22)
    assert gain is not None
    torch.testing.assert_close(gain.gamma, torch.full((N,), 0.22), rtol=1e-2, atol=0)
    assert gain.c == 0.0, "no token counts for more than another"
    assert gain.of_tokens(outputs(seed=5)).unique().tolist() == pytest.approx([1.0], rel=2e-3)


OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "another tensor": lambda y: outputs(seed=9),
    "a norm that takes the mean off": lambda y: functional.layer_norm(y, (N,), GAMMA),
    "a bend": lambda y: torch.tanh(y),
    "a sum": lambda y: normed(y) + 0.2 * outputs(seed=9),
    "nothing": torch.zeros_like,
    "infinity": lambda y: y * torch.inf,
    "the other way round": lambda y: y * torch.tensor([1.0, -1.0]).repeat(8)[:, None],
}


@pytest.mark.parametrize("made", OTHER.values(), ids=OTHER)
def test_anything_else_is_not(made: Callable[[Tensor], Tensor]) -> None:
    y = outputs()
    assert find_gain(y, made(y)) is None


def test_one_token_says_nothing() -> None:
    y = outputs(1)
    assert find_gain(y, normed(y)) is None
    assert find_gain(outputs(), normed(outputs(8))) is None


def test_the_goal_is_the_least_squares_solution_behind_the_norm() -> None:
    """Per row, the weighted problem of the oracle; the streams differ, and so do the residuals."""
    x = activations(SAMPLES * LENGTH, K).float().reshape(SAMPLES, LENGTH, K)
    x *= torch.linspace(0.2, 5.0, LENGTH)[:, None]
    W, A = (20 * weights(N, K, seed).float() for seed in (1, 9))
    gain = Gain(GAMMA, 1.0, 1e-6)
    dense = x @ (torch.eye(K) + 0.05 * weights(K, K, 77).float() / 0.02 / K**0.5)
    gap = normed(x @ W.T) * 0.2 + gain.of_tokens(x @ W.T) * GAMMA * (x @ A.T)
    with StageMoments(K, CPU, samples=SAMPLES, dense=True, weight=W, gain=gain) as moments:
        for i in range(0, SAMPLES, 2):
            moments.add(x[i : i + 2], dense[i : i + 2], i, gap[i : i + 2])
        H = moments.hessian()
        goals, choice = moments.goal([W], H, 1e-5)
    assert goals is not None
    assert choice.alpha > 0.95
    flat = [part.reshape(-1, part.shape[-1]).double() for part in (x, dense, gap)]
    want = reference.goal_behind_a_norm(W.double(), GAMMA.double(), 1e-6, *flat)
    torch.testing.assert_close(W + (goals[0] - W) / choice.alpha, want.float(), rtol=1e-2, atol=2e-3)
    scaled = torch.stack([r / r.square().mean().add(1e-6).sqrt() for r in (x @ W.T).reshape(-1, N)])
    s = (scaled / (x @ W.T).reshape(-1, N))[:, :1]
    torch.testing.assert_close(H, reference.hessian(flat[0] * s.double()).float(), rtol=1e-3, atol=1e-4)


def test_a_bias_is_normed_too() -> None:
    x = activations(SAMPLES * LENGTH, K).float().reshape(SAMPLES, LENGTH, K)
    W, bias = weights(N, K, 1).float(), torch.linspace(-1, 1, N)
    found = []
    for given in (bias, None):
        gain = Gain(GAMMA, 1.0, 0.0)
        with StageMoments(K, CPU, samples=0, dense=False, weight=W, bias=given, gain=gain) as moments:
            moments.add(x, None, 0)
            found.append(moments.hessian())
    s = (x @ W.T + bias).square().mean(-1, keepdim=True).rsqrt()
    torch.testing.assert_close(
        found[0], reference.hessian((x * s).reshape(-1, K)).float(), rtol=1e-3, atol=1e-4
    )
    assert not torch.allclose(found[0], found[1], rtol=0.1)


def test_rows_that_hardly_arrive_make_up_for_nothing() -> None:
    gain = Gain(torch.tensor([1.0, 1e-4, 0.0, -0.5]), 1.0, 0.0)
    assert gain.inverse.tolist() == [1.0, 0.0, 0.0, -2.0]


def test_a_token_of_nothing_does_not_outweigh_the_others() -> None:
    x = activations(LENGTH, K).float()[None]
    x[:, 3] = 0
    with StageMoments(
        K, CPU, samples=0, dense=False, weight=weights(N, K, 1).float(), gain=Gain(GAMMA, 1.0, 0.0)
    ) as moments:
        moments.add(x, None, 0)
        assert moments.finite()


def test_norm_modules_are_found_by_what_they_do() -> None:
    class Oddly(nn.Module):
        """A norm like Gemma's, whose weight is one less."""

        def forward(self, y: Tensor) -> Tensor:
            return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + (GAMMA - 1))

    y = outputs()
    gain = find_gain(y, Oddly()(y))
    assert gain is not None
    assert gain.gamma.div(gain.gamma[0]).tolist() == pytest.approx((GAMMA / GAMMA[0]).tolist(), rel=1e-4)
