"""The token that every sample begins with: what it adds, and that massive activations are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.first_token import SHARE, add_tokens, emphasis, shared_start
from gptq_cli.gptq.hessian import CrossMoment, Hessian
from gptq_cli.gptq.moments import StageMoments
from gptq_cli.gptq.solver import quantize_linears
from tests.gptq.cases import activations, weights

SAMPLES, LENGTH, K, N = 6, 40, 32, 24
CPU = torch.device("cpu")


@pytest.fixture
def x() -> Tensor:
    """Samples whose first tokens are alike."""
    found = activations(SAMPLES * LENGTH, K, dtype=torch.float32).reshape(SAMPLES, LENGTH, K).clone()
    found[:, 0] = activations(1, K, dtype=torch.float32) + 0.01 * found[:, 0]
    return found


@pytest.mark.parametrize(
    ("rows", "same"),
    [([[1, 2], [1, 3]], True), ([[1, 2], [2, 2]], False), ([[1, 2]], False), ([[1], [1], [1]], True)],
)
def test_a_start_is_shared_by_several_samples(rows: list[list[int]], same: bool) -> None:
    assert shared_start(torch.tensor(rows)) is same


def test_it_counts_as_a_quarter_of_the_others_in_energy_or_number(x: Tensor) -> None:
    own, others = x[:, 0].square().sum(-1), x[:, 1:].square().sum((1, 2))
    weight = emphasis(x)[:, 0].square() + 1
    torch.testing.assert_close(weight, SHARE * (others / own).clamp(max=LENGTH - 1))
    small = torch.cat([x[:, :1] / 100, x[:, 1:]], dim=1)
    torch.testing.assert_close(emphasis(small).square() + 1, torch.full((SAMPLES, 1), SHARE * (LENGTH - 1)))


def test_massive_and_empty_first_tokens_are_left_alone(x: Tensor) -> None:
    massive = torch.cat([x[:, :1] * 1000, x[:, 1:]], dim=1)
    assert emphasis(massive).tolist() == [[0.0]] * SAMPLES
    assert emphasis(torch.zeros(2, 3, 4)).tolist() == [[0.0]] * 2
    assert emphasis(x[:, :1]).tolist() == [[0.0]] * SAMPLES  # samples of one token


def test_a_dtype_holds_what_it_becomes() -> None:
    x = torch.full((1, 2000, 2), 30000.0, dtype=torch.float16)
    first = (x[:, 0] * emphasis(x)).to(x.dtype)
    assert torch.isfinite(first).all()
    assert float(first.max()) > 30000
    small, error = torch.cat([x[:, :1] / 1000, x[:, 1:]], dim=1), x
    assert float(emphasis(small).min()) > 2
    with Hessian(2) as hessian, CrossMoment(2, CPU) as cross:
        add_tokens(small, hessian, error, cross, one_start=True)
        assert hessian.finite()
        assert cross.finite()


def test_the_sums_have_it_and_the_count_has_not(x: Tensor) -> None:
    error = activations(SAMPLES * LENGTH, N, dtype=torch.float32).reshape(SAMPLES, LENGTH, N)
    weight = torch.ones(SAMPLES, LENGTH)
    weight[:, 0] = emphasis(x)[:, 0].square() + 1
    with Hessian(K) as hessian, CrossMoment(K, CPU, rows=N) as cross:
        add_tokens(x, hessian, error, cross, one_start=True)
        assert hessian.tokens == cross.tokens == SAMPLES * LENGTH
        weighted = (x * weight[..., None]).flatten(0, 1)
        flat, count = x.flatten(0, 1), SAMPLES * LENGTH
        torch.testing.assert_close(hessian.matrix(), weighted.T @ flat / count, rtol=1e-4, atol=1e-5)
        e = error.flatten(0, 1)
        torch.testing.assert_close(cross.matrix(), e.T @ weighted / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_a_stage_keeps_the_output_of_the_shared_token(x: Tensor, *, dense: bool) -> None:
    """Without a dense stream and with one; the other tokens lose little by it."""
    W = weights(N, K, 3).float()
    config = QuantizeConfig(bits=4, group_size=16, scale_search="minmax")
    first, others = {}, {}
    for one_start in (False, True):
        with StageMoments(K, CPU, samples=SAMPLES, dense=dense, one_start=one_start) as moments:
            for start in range(0, SAMPLES, 2):
                part = x[start : start + 2]
                moments.add(part, part if dense else None, start)
            assert moments.tokens == SAMPLES * LENGTH
            (solved,) = quantize_linears([W], moments.hessian(), config)
        E = W - solved.dequantize(torch.float32)
        first[one_start] = float((x[0, 0] @ E.T).norm())
        others[one_start] = float((x[:, 1:] @ E.T).norm())
    assert first[True] < 0.5 * first[False]
    assert others[True] < 1.2 * others[False]
