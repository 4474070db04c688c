"""The moments of a stage: held-out samples, the length of the step, and its gain on unseen text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.gptq.choice import StepChoice
from gptq_cli.gptq.moments import StageMoments
from tests.gptq.cases import activations, weights

K, SAMPLES, LENGTH = 24, 8, 60
CPU = torch.device("cpu")


def two_streams(samples: int = SAMPLES, noise: float = 0.1, seed: int = 50) -> tuple[Tensor, Tensor]:
    """(dense, quant), each (samples, LENGTH, K) in float32: quant is a disturbed mixture of dense."""
    dense = activations(samples * LENGTH, K).float().reshape(samples, LENGTH, K)
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(K) + 0.05 * torch.randn(K, K, generator=generator)
    return dense, dense @ mixing + noise * dense.std() * torch.randn(dense.shape, generator=generator)


def collected(dense: Tensor, quant: Tensor, batch: int) -> tuple[Tensor, list[Tensor] | None, float]:
    W = [weights(5, K, 1).float(), weights(3, K, 2).float()]
    with StageMoments(K, CPU, samples=len(quant), dense=True) as moments:
        for start in range(0, len(quant), batch):
            moments.add(quant[start : start + batch], dense[start : start + batch], start)
        assert moments.tokens == quant.shape[0] * LENGTH
        H = moments.hessian()
        goals, choice = moments.goal(W, H, 0.05)
        return H, goals, choice.alpha


def test_without_a_dense_stream_it_is_the_hessian() -> None:
    _, quant = two_streams()
    with StageMoments(K, CPU, samples=SAMPLES, dense=False) as moments:
        moments.add(quant, None, 0)
        H = moments.hessian()
        assert moments.goal([torch.ones(1, K)], H, 0.05) == (None, StepChoice())
    flat = quant.reshape(-1, K)
    torch.testing.assert_close(H, flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5)


def test_the_cut_into_micro_batches_does_not_matter() -> None:
    dense, quant = two_streams()
    H, goals, alpha = collected(dense, quant, 8)
    assert goals is not None
    for batch in (1, 3, 5):
        H_other, targets_other, alpha_other = collected(dense, quant, batch)
        torch.testing.assert_close(H_other, H, rtol=1e-4, atol=1e-5)
        assert alpha_other == pytest.approx(alpha, rel=1e-3)
        assert targets_other is not None
        for ours, theirs in zip(targets_other, goals, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_samples_without_a_dense_copy_count_for_the_hessian_alone() -> None:
    dense, quant = two_streams()
    W = [weights(5, K, 1).float(), weights(3, K, 2).float()]
    with StageMoments(K, CPU, samples=SAMPLES, dense=True) as moments:
        for i in range(SAMPLES):
            moments.add(quant[i : i + 1], dense[i : i + 1] if i % 2 else None, i)
        H = moments.hessian()
        goals, choice = moments.goal(W, H, 0.05)
    everything, _, full = collected(dense, quant, 1)
    torch.testing.assert_close(H, everything, rtol=1e-4, atol=1e-5)
    assert goals is not None
    assert 0.3 < choice.alpha <= full + 0.2
    with StageMoments(K, CPU, samples=SAMPLES, dense=True) as moments:
        moments.add(quant, None, 0)
        assert moments.goal(W, moments.hessian(), 0.05) == (None, StepChoice())


def test_the_last_quarter_decides() -> None:
    dense, quant = two_streams()
    _, _, alpha = collected(dense, quant, 2)
    assert alpha > 0.5, "the mixture is the same everywhere, so the step holds up"
    other = dense.clone()
    other[6:] = 2 * quant[6:] - dense[6:]  # there, the correction points the other way
    assert collected(other, quant, 2)[2] == 0.0
    other = dense.clone()
    other[5] = 2 * quant[5] - dense[5]  # sample 5 belongs to the step, not to the judges
    assert collected(other, quant, 2)[2] > 0.0


def test_the_target_pays_on_samples_nobody_has_seen() -> None:
    dense, quant = two_streams(samples=40)
    _, goals, _ = collected(dense[:SAMPLES], quant[:SAMPLES], 4)
    assert goals is not None
    W = torch.cat([weights(5, K, 1), weights(3, K, 2)]).float()
    goal = dense[SAMPLES:] @ W.T
    before = (goal - quant[SAMPLES:] @ W.T).square().sum()
    after = (goal - quant[SAMPLES:] @ torch.cat(goals).T).square().sum()
    assert after < 0.8 * before


def test_too_few_samples_leave_nothing_to_decide_on() -> None:
    dense, quant = two_streams(samples=3)
    assert collected(dense, quant, 1)[1:] == (None, 0.0)


def test_no_token_gives_zeros_and_freed_moments_say_so() -> None:
    moments = StageMoments(K, CPU, samples=8, dense=True)
    assert moments.tokens == 0
    assert torch.equal(moments.hessian(), torch.zeros(K, K))
    moments.free()
    with pytest.raises(RuntimeError, match="freed"):
        moments.add(torch.ones(1, 2, K), torch.ones(1, 2, K), 0)


def test_infinity_is_noticed_wherever_it_comes_in() -> None:
    dense, quant = two_streams()
    for sample in (0, 7):
        with StageMoments(K, CPU, samples=SAMPLES, dense=True) as moments:
            moments.add(quant, dense, 0)
            assert moments.finite()
            bad = quant.clone()
            bad[sample, 3, 2] = torch.inf
            moments.add(bad, dense, 0)
            assert not moments.finite()
        with StageMoments(K, CPU, samples=SAMPLES, dense=True) as moments:
            bad = dense.clone()
            bad[sample, 3, 2] = torch.nan
            moments.add(quant, bad, 0)
            assert not moments.finite()
        with StageMoments(K, CPU, samples=SAMPLES, dense=True, weight=torch.ones(3, K)) as moments:
            gap = torch.zeros(SAMPLES, LENGTH, 3)
            gap[sample, 3, 1] = torch.inf
            moments.add(quant, dense, 0, gap)
            assert not moments.finite()


def test_the_residual_is_made_up_for() -> None:
    """The goal is r_dense + W x_dense; what r lacks is partly a function of x."""
    dense, quant = two_streams(samples=40)
    W = weights(5, K, 1).float()
    lost = 0.3 * quant @ weights(5, K, 9).float().T
    gap = lost + 0.05 * lost.std() * torch.randn(lost.shape, generator=torch.Generator().manual_seed(3))
    found = []
    for told in (gap, None):
        with StageMoments(K, CPU, samples=SAMPLES, dense=True, weight=W) as moments:
            for i in range(0, SAMPLES, 2):
                part = slice(i, i + 2)
                moments.add(quant[part], dense[part], i, None if told is None else told[part])
            goals, choice = moments.goal([W], moments.hessian(), 0.05)
        assert goals is not None
        assert choice.alpha > 0.5
        unseen = slice(SAMPLES, None)
        goal = dense[unseen] @ W.T + gap[unseen]
        found.append(float((goal - quant[unseen] @ goals[0].T).square().sum()))
    assert found[0] < 0.5 * found[1]
    with_outputs = StageMoments(K, CPU, samples=SAMPLES, dense=True, weight=W)
    with_inputs = StageMoments(K, CPU, samples=SAMPLES, dense=True)
    goals = []
    for moments in (with_outputs, with_inputs):
        moments.add(quant[:SAMPLES], dense[:SAMPLES], 0)
        (target,), _ = moments.goal([W], moments.hessian(), 0.05)
        goals.append(target)
    torch.testing.assert_close(*goals, rtol=1e-3, atol=1e-4)


def test_a_residual_that_is_lost_does_not_ask_for_huge_weights() -> None:
    """A residual a thousand times larger than the output, whose error x foretells exactly."""
    dense, quant = two_streams()
    W = weights(5, K, 1).float()
    gap = 640 * quant @ weights(5, K, 9).float().T
    with StageMoments(K, CPU, samples=SAMPLES, dense=True, weight=W) as moments:
        moments.add(quant, dense, 0, gap)
        goals, choice = moments.goal([W], moments.hessian(), 0.05)
    assert goals is not None
    assert choice.bounded_rows == 5
    assert choice.moved == pytest.approx(1.0, rel=0.5)
    assert float((goals[0] - W).norm()) == pytest.approx(choice.moved * float(W.norm()), rel=1e-3)
