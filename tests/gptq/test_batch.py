"""Stages of one shape solved side by side: what each would get alone, and none hears of another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import NonFinite
from gptq_cli.gptq import rounding
from gptq_cli.gptq.factor import factorize, factorize_each
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears, quantize_stages
from tests.gptq.cases import activations, weights

K, ROWS = 80, (24, 8)


def stages(count: int, dtype: torch.dtype = torch.float32) -> tuple[list[list[Tensor]], Tensor]:
    """Linears of ROWS rows each, and an H for every stage, of different loudness and tokens."""
    W = [[weights(n, K, seed=10 * e + i, dtype=dtype) for i, n in enumerate(ROWS)] for e in range(count)]
    X = [activations(100 + 30 * e, K, seed=e, dtype=dtype) for e in range(count)]
    return W, torch.stack([x.T @ x / len(x) for x in X])


def alone(W: list[list[Tensor]], H: Tensor, config: QuantizeConfig) -> list[list[QuantizedLinear]]:
    return [quantize_linears(one, h, config) for one, h in zip(W, H, strict=True)]


def assert_same(ours: list[list[QuantizedLinear]], theirs: list[list[QuantizedLinear]]) -> None:
    for here, there in zip(ours, theirs, strict=True):
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.scales, b.scales)
            assert torch.equal(a.zeros, b.zeros)
            assert torch.equal(a.g_idx, b.g_idx)
            assert a.loss == pytest.approx(b.loss, rel=1e-5, abs=1e-12)
            assert a.rtn_loss == pytest.approx(b.rtn_loss, rel=1e-5)
            assert (a.method, a.attempts, a.damp_percent) == (b.method, b.attempts, b.damp_percent)


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"sweeps": 0, "refit": False},
    "thorough": {"sweeps": 3, "refit": True},
    "desc_act": {"desc_act": True},
    "no order": {"act_order": "none"},
    "asymmetric": {"sym": False},
    "asymmetric desc_act": {"sym": False, "desc_act": True, "column_batch": 48},
    "minmax": {"scale_search": "minmax", "act_order": "none", "sweeps": 0, "refit": False},
    "mse": {"scale_search": "mse", "sweeps": 1},
    "one group": {"group_size": -1, "refit": True, "column_batch": 32},
    "3 bits": {"bits": 3},
    "a short group": {"group_size": 64},
    "narrow batches": {"column_batch": 16, "desc_act": True, "refit": True},
    "positive scales": {"positive_scales": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_gives_what_each_stage_gets_alone(name: str) -> None:
    config = QuantizeConfig(**{"group_size": 16} | CONFIGS[name])
    W, H = stages(3)
    H[1, 5] = H[1, :, 5] = 0  # an input that is never anything but 0, in one of them
    kept = [w.clone() for one in W for w in one], H.clone()
    assert_same(quantize_stages(W, H, config), alone(W, H, config))
    assert all(torch.equal(a, b) for a, b in zip(kept[0], [w for one in W for w in one], strict=True))
    assert torch.equal(kept[1], H)


def test_a_batch_in_float64_too() -> None:
    W, H = stages(2, torch.float64)
    config = QuantizeConfig(group_size=16)
    assert_same(quantize_stages(W, H, config), alone(W, H, config))


def test_a_batch_of_one() -> None:
    W, H = stages(1)
    config = QuantizeConfig(group_size=16)
    assert_same(quantize_stages(W, H, config), alone(W, H, config))


def indefinite(K: int, least: float) -> Tensor:
    """Mean diagonal 1; the least eigenvalue is `least`."""
    H = torch.eye(K)
    H[0, 1] = H[1, 0] = 1 - least
    return H


def test_only_the_stage_that_needs_it_is_damped_further() -> None:
    W, H = stages(4)
    H[1] = indefinite(K, -0.15)  # works at 0.2, the third step
    H[2] = 0.0
    H[3] = indefinite(K, -1.5)  # works at no step
    config = QuantizeConfig(group_size=16, damp_percent=0.05)
    together = quantize_stages(W, H, config)
    assert [one[0].method for one in together] == ["gptq", "gptq", "rtn", "rtn"]
    assert [one[0].attempts for one in together] == [1, 3, 0, 6]
    assert [one[0].damp_percent for one in together] == [0.05, 0.2, 0.05, 1.0]
    assert_same(together, alone(W, H, config))


def test_factors_of_a_batch_are_those_of_each() -> None:
    _, H = stages(3)
    H[1] = indefinite(K, -0.15)
    order = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(e)) for e in range(3)])
    RT, factors = factorize_each(H, order, 0.05)
    for h, o, r, found in zip(H, order, RT, factors, strict=True):
        one = factorize(h, o, 0.05)
        assert one.RT is not None
        assert torch.equal(r, one.RT)
        assert (found.attempts, found.damp_percent) == (one.attempts, one.damp_percent)
        assert torch.equal(found.damping, one.damping)
    assert factors[0].RT is not None
    assert factors[0].RT.data_ptr() == RT.data_ptr()


def test_the_columns_are_walked_once_for_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    real = rounding.gptq

    def counted(W: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(W.shape))
        return real(W, *args, **kwargs)

    monkeypatch.setattr(rounding, "gptq", counted)
    W, H = stages(5)
    quantize_stages(W, H, QuantizeConfig(group_size=16))
    assert shapes == [(5, K, sum(ROWS))]


def test_what_cannot_be_solved_is_refused_wherever_it_stands() -> None:
    W, H = stages(3)
    H[2, 3, 3] = torch.inf
    with pytest.raises(NonFinite, match="Hessian"):
        quantize_stages(W, H, QuantizeConfig(group_size=16))
    W, H = stages(3)
    W[1][0][0, 0] = torch.nan
    with pytest.raises(NonFinite, match="weight holds NaN"):
        quantize_stages(W, H, QuantizeConfig(group_size=16))
