"""Rows that make up for each other: the loss that counts falls, and what is not known changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq import feedback
from gptq_cli.gptq.feedback import _RUN, OutputMoment, drawn_label_gradient
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.placement import schedule

CONFIG = QuantizeConfig.of("balanced", group_size=16, bits=3)
K, N = 48, 200


def moment_of(gradients: Tensor) -> OutputMoment:
    moment = OutputMoment(gradients.shape[-1], gradients.device)
    moment.add(gradients)
    return moment


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """A weight (N, K), its H, and gradients at its outputs that are correlated."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(N, K, generator=generator)
    x = torch.randn(4 * K, K, generator=generator)
    mixed = torch.randn(8, N, generator=generator)
    gradients = torch.randn(1, 600, 8, generator=generator) @ mixed
    return weight, x.T @ x / len(x), gradients + 0.3 * torch.randn(1, 600, N, generator=generator)


def loss(weight: Tensor, solved: QuantizedLinear, A: Tensor, H: Tensor) -> float:
    E = weight - solved.dequantize()
    return float((A * (E @ H @ E.T)).sum())


def test_the_models_loss_falls_and_the_rows_own_rises(case: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, H, gradients = case
    (apart,) = quantize_linears([weight], H, CONFIG)
    (together,) = quantize_linears([weight], H, CONFIG, outputs=[moment_of(gradients)])
    g = gradients.flatten(0, 1)
    assert loss(weight, together, g.T @ g, H) < 0.75 * loss(weight, apart, g.T @ g, H)
    assert together.loss > apart.loss  # which is why it is not what is asked for
    own = loss(weight, together, torch.eye(N), H) / float((weight @ H * weight).sum())
    assert together.loss == pytest.approx(own, rel=1e-4)


def test_gradients_that_are_independent_leave_rows_apart(case: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, H, _ = case
    moment = OutputMoment(N, H.device)
    moment.panels[0][1].copy_(torch.diag(torch.arange(1.0, N + 1)))
    (apart,) = quantize_linears([weight], H, CONFIG)
    for known in (moment, OutputMoment(N, H.device)):  # the second: all 0, an output that nothing reads
        (solved,) = quantize_linears([weight], H, CONFIG, outputs=[known])
        assert (solved.codes != apart.codes).float().mean() < 0.002  # sums are rounded otherwise
        assert solved.loss == pytest.approx(apart.loss, rel=1e-3)


def test_linears_of_a_stage_are_solved_as_each_by_itself(case: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, H, gradients = case
    weights = [weight, weight[:70] * 2, weight[:9]]
    outputs = [moment_of(gradients), moment_of(gradients[..., :70]), None]
    together = quantize_linears(weights, H, CONFIG, outputs=outputs)
    for one, own, known in zip(weights, together, outputs, strict=True):
        (alone,) = quantize_linears([one], H, CONFIG, outputs=[known])
        assert own.codes.shape == one.shape
        assert (own.codes != alone.codes).float().mean() < 0.002


def test_a_part_makes_up_for_all_rows_before_it(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """tr(A E H Eᵀ) is the sum over parts of tr(D_p F_p H F_pᵀ), F the error of the goals that are handed
    out."""
    _, H, gradients = case
    moment = moment_of(gradients)
    A = moment.panels[0][1]
    damped = A + feedback.DAMPING * A.diagonal().mean() * torch.eye(N)
    E = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for part in feedback._parts(torch.arange(N), A, 64):
        F = E[part.rows] + part.share.T @ E[part.before]
        rest = damped[part.rows][:, part.rows]
        later = torch.tensor(sorted(set(range(N)) - set(part.rows.tolist()) - set(part.before.tolist())))
        # D_p: what of the part's own block is not explained by the parts that come after it
        if len(later):
            cross = damped[part.rows][:, later]
            rest = rest - cross @ torch.linalg.solve(damped[later][:, later], cross.T)
        total += float((rest * (F @ H @ F.T)).sum())
    assert total == pytest.approx(float((damped * (E @ H @ E.T)).sum()), rel=1e-3)


def test_a_wide_linear_is_known_in_panels(
    case: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, H, gradients = case
    monkeypatch.setattr(schedule, "PANEL_ROWS", 90)
    moment = moment_of(gradients)
    assert [rows for rows, _ in moment.panels] == [slice(0, 67), slice(67, 134), slice(134, 200)]
    (solved,) = quantize_linears([weight], H, CONFIG, outputs=[moment])
    (apart,) = quantize_linears([weight], H, CONFIG)
    A = torch.block_diag(*(A for _, A in moment.panels))
    assert loss(weight, solved, A, H) < loss(weight, apart, A, H)


def test_a_long_gradient_is_shortened(case: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, gradients = case
    plain = moment_of(gradients).panels[0][1].trace()
    gradients[0, 5] *= 1e6
    assert moment_of(gradients).panels[0][1].trace() < 1.1 * plain
    gradients[0, 1:] = 0  # most tokens have none: nothing to compare with
    mean = gradients[0, :1].T @ gradients[0, :1] / gradients.shape[1]
    assert torch.equal(moment_of(gradients).panels[0][1], mean)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_gradients_that_are_not_finite_are_seen(case: tuple[Tensor, Tensor, Tensor], bad: float) -> None:
    gradients = case[2]
    assert bool(moment_of(gradients).finite())
    gradients[0, 7, 3] = bad
    assert not bool(moment_of(gradients).finite())


@pytest.mark.parametrize("words", [4, 2 * _RUN, 2 * _RUN + 3])
def test_labels_are_drawn_as_the_model_says(words: int) -> None:
    likely = torch.tensor([0, 1, words // 2, words - 1])
    row = torch.full((words,), -torch.inf).index_copy(0, likely, torch.tensor([0.0, 1.0, -2.0, 3.0]))
    logits = row.expand(40_000, words).clone().requires_grad_()
    found = drawn_label_gradient(logits, torch.Generator().manual_seed(0))
    p = torch.softmax(row, -1)
    labels = (p - found).round()  # one of them is 1
    torch.testing.assert_close(labels.mean(0), p, atol=0.01, rtol=0)
    assert bool((labels.sum(-1) == 1).all())
    loss = torch.nn.functional.cross_entropy(logits, labels.argmax(-1), reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], found)
