"""One Cholesky is enough: its blocks are the blocks of the paper's U, its feedback is the paper's."""

from __future__ import annotations

import pytest
import torch

from gptq_cli.gptq.factor import (
    columns_with_feedback,
    damping_steps,
    dead_columns,
    factorize,
    reverse_in_place,
)
from tests import reference
from tests.gptq.cases import activations, weights


@pytest.mark.parametrize("K", [1, 2, 33, 64])
def test_the_factor_reproduces_the_damped_hessian_in_solving_order(K: int) -> None:
    H = reference.hessian(activations(100, K))
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    before = H.clone()
    factor = factorize(H, order, 0.05)
    assert factor.RT is not None
    damped = H[order][:, order] + factor.damping * torch.eye(K, dtype=torch.float64)
    torch.testing.assert_close(factor.RT.T @ factor.RT, damped, rtol=1e-10, atol=1e-12)
    assert torch.equal(factor.RT, factor.RT.tril())
    assert float(factor.damping) == pytest.approx(0.05 * float(H.diagonal().mean()))
    assert torch.equal(H, before)


def test_current_columns_are_those_of_the_paper() -> None:
    """W_ab - E U[:a, a:b] with U = chol(H⁻¹, upper), and U_bb is its block."""
    K, N = 40, 5
    H, W = reference.hessian(activations(200, K)), weights(K, N)
    factor = factorize(H, torch.arange(K), 0.05)
    assert factor.RT is not None
    inverse = torch.linalg.inv(H + factor.damping * torch.eye(K, dtype=torch.float64))
    U = torch.linalg.cholesky(inverse, upper=True)
    E = weights(K, N, seed=5)
    work = W.clone()
    work[:24] = (E.T @ U).T[:24]  # D = W - Q on the columns that are done
    for a, b in ((24, 32), (24, 40), (0, 8)):
        B, UT = columns_with_feedback(work, factor.RT, a, b)
        torch.testing.assert_close(UT.T, U[a:b, a:b], rtol=1e-9, atol=1e-12)
        want = work[a:b] - (E[:a].T @ U[:a, a:b]).T if a else work[:b]
        torch.testing.assert_close(B, want, rtol=1e-9, atol=1e-12)


def test_a_dead_column_stands_apart_and_does_not_move_the_damping() -> None:
    X = activations(100, 12)
    X[:, 4] = 0
    H = reference.hessian(X)
    alive = [k for k in range(12) if k != 4]
    assert dead_columns(H).nonzero().flatten().tolist() == [4]
    factor = factorize(H, torch.arange(12), 0.05)
    assert factor.RT is not None
    mean = float(H.diagonal()[alive].mean())
    assert float(factor.damping) == pytest.approx(0.05 * mean)
    built = factor.RT.T @ factor.RT
    assert float(built[4, 4]) == pytest.approx(1.05 * mean)
    assert (built[4, alive].abs() < 1e-14).all()


def test_damping_doubles_up_to_the_whole_mean() -> None:
    assert damping_steps(0.05) == (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
    assert damping_steps(0.5) == (0.5, 1.0)
    assert len(damping_steps(0.01)) == 8


def test_no_damping_helps_and_nothing_to_factorise() -> None:
    H = torch.eye(4, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 9.0
    hopeless = factorize(H, torch.arange(4), 0.2)
    assert (hopeless.RT, hopeless.attempts, hopeless.damp_percent) == (None, 4, 1.0)
    empty = factorize(torch.zeros(4, 4), torch.arange(4), 0.2)
    assert (empty.RT, empty.attempts, empty.damp_percent) == (None, 0, 0.2)


@pytest.mark.parametrize("n", [1, 2, 5, 1025])
def test_reversing_in_place(n: int) -> None:
    A = torch.arange(n * n, dtype=torch.float32).view(n, n).clone()
    want = A.flip(0, 1)
    reverse_in_place(A)
    assert torch.equal(A, want)
