"""The asymmetric step: what it minimises, and how far it goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.choice import StepChoice, choose_step, held_out_alpha
from gptq_cli.gptq.goal import asymmetric_step, bounded_step
from gptq_cli.gptq.hessian import CrossMoment, Hessian
from gptq_cli.gptq.solver import quantize_linears
from tests.gptq.cases import activations, weights


def streams(tokens: int, K: int) -> tuple[Tensor, Tensor]:
    """The dense model's activations, and what earlier quantized blocks made of them."""
    dense = activations(tokens, K)
    mixing = torch.eye(K, dtype=torch.float64) + 0.05 * weights(K, K, 77) / 0.02 / K**0.5
    noise = torch.randn(tokens, K, generator=torch.Generator().manual_seed(50), dtype=torch.float64)
    return dense, dense @ mixing + 0.1 * noise * dense.std()


def moments(dense: Tensor, quant: Tensor) -> tuple[Tensor, Tensor]:
    K = dense.shape[1]
    with Hessian(K, dtype=torch.float64) as hessian, CrossMoment(K, dtype=torch.float64) as cross:
        hessian.add(quant)
        cross.add(dense - quant, quant)
        return hessian.matrix(), cross.matrix()


def aimed_at_dense(W: Tensor, H: Tensor, D: Tensor, alpha: float, damp_percent: float) -> Tensor:
    V, _ = asymmetric_step(W @ D, H, damp_percent)
    assert V is not None
    return W + alpha * V


def output_error(W: Tensor, Q: Tensor, dense: Tensor, quant: Tensor) -> float:
    return float((dense @ W.T - quant @ Q.T).square().sum())


def test_the_full_step_is_the_least_squares_solution() -> None:
    dense, quant = streams(500, 24)
    W = weights(6, 24)
    H, D = moments(dense, quant)
    got = aimed_at_dense(W, H, D, 1.0, 1e-9)
    want = torch.linalg.lstsq(quant, dense @ W.T).solution.T
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_equal_streams_leave_the_weights() -> None:
    dense, quant = streams(300, 16)
    W = weights(4, 16)
    H, D = moments(dense, dense)
    torch.testing.assert_close(aimed_at_dense(W, H, D, 1.0, 0.05), W, rtol=0, atol=1e-12)
    H, D = moments(dense, quant)
    assert not torch.allclose(aimed_at_dense(W, H, D, 0.5, 0.05), W)


def test_no_factor_no_step() -> None:
    W, nothing = weights(4, 8), torch.zeros(8, 8, dtype=torch.float64)
    assert asymmetric_step(W @ nothing, nothing, 0.05)[0] is None


def test_codes_of_the_target_answer_the_dense_model_better() -> None:
    dense, quant = streams(2000, 48)
    W = weights(16, 48)
    H, D = moments(dense, quant)
    config = QuantizeConfig(group_size=16)
    (plain,) = quantize_linears([W], H, config)
    (aimed,) = quantize_linears([W], H, config, goals=[aimed_at_dense(W, H, D, 1.0, 0.01)])
    errors = [output_error(W, q.dequantize(torch.float64), dense, quant) for q in (plain, aimed)]
    assert errors[1] < 0.8 * errors[0]
    assert aimed.rtn_loss > plain.rtn_loss, "both are held against the target, which nearest knows nothing of"


@pytest.mark.parametrize("tokens", [40, 4000])
def test_the_held_out_alpha_is_the_best_of_a_scan(tokens: int) -> None:
    """Few tokens: a shorter step. Many: the full one."""
    W = weights(6, 32)
    dense, quant = streams(tokens + 3000, 32)
    H, D = moments(dense[:tokens], quant[:tokens])
    V, _ = asymmetric_step(W @ D, H, 0.001)
    assert V is not None
    dense, quant = dense[tokens:], quant[tokens:]
    H, D = moments(dense, quant)
    alpha, change = held_out_alpha(W @ D, V, H)
    scan = [i / 50 for i in range(51)]
    best = min(scan, key=lambda a: output_error(W, W + a * V, dense, quant))
    assert alpha == pytest.approx(best, abs=0.011)
    lost, kept = (output_error(W, Q, dense, quant) for Q in (W, W + alpha * V))
    assert change == pytest.approx((kept - lost) / len(dense), rel=1e-6)
    assert alpha > 0.9 if tokens > 1000 else alpha < 0.9


@pytest.mark.parametrize(
    ("cut", "noise", "damps"),
    [(400, 0.0, (0.0005, 0.002)), (100, 1.0, (0.008, 0.1)), (40, 10.0, (0.008, 1.0))],
)
def test_held_out_tokens_choose_the_damping_too(cut: int, noise: float, damps: tuple[float, float]) -> None:
    """With fewer tokens, and noise that x does not foretell, the step is damped more."""
    W = weights(6, 32)
    dense, quant = streams(4000, 32)
    errors = (dense - quant) @ W.T
    generator = torch.Generator().manual_seed(7)
    errors += noise * errors.std() * torch.randn(errors.shape, generator=generator, dtype=torch.float64)
    (B, H), (B_held, H_held) = (
        (e.T @ x / len(x), x.T @ x / len(x))
        for e, x in ((errors[:cut], quant[:cut]), (errors[cut:], quant[cut:]))
    )
    choice = choose_step(B, H, B_held, H_held, 0.0005)
    assert damps[0] <= choice.damp_percent <= damps[1]

    def change(damp: float) -> float:
        V, _ = asymmetric_step(B, H, damp)
        assert V is not None
        return held_out_alpha(B_held, V, H_held)[1]

    scan = min(change(0.0005 * 2**i) for i in range(10))
    assert scan <= change(choice.damp_percent) < 0.9 * scan < 0


def test_a_step_that_held_out_tokens_speak_against_is_not_taken() -> None:
    W = weights(6, 32)
    dense, quant = streams(500, 32)
    H, D = moments(dense, quant)
    assert choose_step(W @ D, H, -W @ D, H, 0.05) == StepChoice()
    nothing = torch.zeros_like(H)
    assert choose_step(W @ D, nothing, W @ D, H, 0.05) == StepChoice()


def test_a_row_moves_by_its_own_size_at_most() -> None:
    W = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0], [5.0, 0.0]])
    V = torch.tensor([[0.3, -0.4], [30.0, 40.0], [0.0, 640.0], [0.0, -5.0]])
    moved, shortened = bounded_step(V, W)
    typical = ((25 + 1 + 0 + 25) / 4) ** 0.5  # of a row that is shorter, this counts
    want = torch.tensor([[0.3, -0.4], [0.6 * typical, 0.8 * typical], [0.0, typical], [0.0, -5.0]])
    torch.testing.assert_close(V, want)
    assert shortened == 2
    assert moved == pytest.approx(float(want.norm() / W.norm()), rel=1e-6)
    assert bounded_step(torch.zeros(2, 3), torch.zeros(2, 3)) == (0.0, 0)
