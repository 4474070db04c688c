"""One pass of GPTQ for several numbers of bits: the codes' error is that of the solver without refinement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import NonFinite
from gptq_cli.gptq.one_pass import Factored, some_rows
from gptq_cli.gptq.solver import quantize_linears
from tests import reference
from tests.gptq.cases import activations, weights

FAST = QuantizeConfig(group_size=16, sweeps=0, refit=False)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_is_that_of_a_solve_without_refinement(bits: int, sym: bool) -> None:
    H = reference.hessian(activations(300, 48))
    both = [weights(12, 48), weights(7, 48, seed=5)]
    factored = Factored.of(H, replace(FAST, bits=8))  # the factor does not depend on the bits
    config = replace(FAST, bits=bits, sym=sym)
    error = factored.error(both, config)
    solved = quantize_linears(both, H, config)
    expected = torch.cat([W - one.dequantize(torch.float64) for W, one in zip(both, solved, strict=True)])
    torch.testing.assert_close(error, expected, rtol=0, atol=1e-7)
    for W, E, one in zip(both, torch.split(error, [12, 7]), solved, strict=True):
        assert factored.loss(E, [W]) == pytest.approx(one.loss, rel=1e-6)


def test_without_a_factor_weights_are_rounded_to_nearest() -> None:
    H, W = torch.zeros(32, 32), weights(6, 32, dtype=torch.float32)
    factored = Factored.of(H, FAST)
    assert factored.RT is None
    (solved,) = quantize_linears([W], H, FAST)
    torch.testing.assert_close(factored.error([W], FAST), W - solved.dequantize())
    assert factored.loss(factored.error([W], FAST), [W]) == 0.0


def test_rows_are_taken_evenly() -> None:
    W = torch.arange(10.0).unsqueeze(1).expand(10, 3)
    assert some_rows(W, 4)[:, 0].tolist() == [0, 3, 6, 9]
    assert torch.equal(some_rows(W, 10), W)
    assert len(some_rows(W, 1)) == 1


def test_numbers_that_are_not_finite_are_refused() -> None:
    H = reference.hessian(activations(100, 32)).float()
    W = weights(4, 32, dtype=torch.float32)
    W[1, 2] = torch.nan
    with pytest.raises(NonFinite, match="NaN or infinity"):
        Factored.of(H, FAST).error([W], FAST)
