"""Refinement only ever helps, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq import rounding
from gptq_cli.gptq.refine import _scale_step
from gptq_cli.gptq.solver import quantize_linears
from tests.gptq.cases import activations, weights


def row_losses(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    E = W.double() - Q.double()
    return ((E @ H.double()) * E).sum(1)


@pytest.mark.parametrize("options", [{"sweeps": 1, "refit": False}, {"sweeps": 0}, {"sweeps": 2}], ids=str)
@pytest.mark.parametrize(
    "layout", [{}, {"desc_act": True}, {"group_size": -1}, {"column_batch": 24}], ids=str
)
@pytest.mark.parametrize("sym", [True, False])
def test_no_row_gets_worse(options: dict[str, Any], layout: dict[str, Any], sym: bool) -> None:
    X = activations(400, 96, dtype=torch.float32)
    H, W = X.T @ X / 400, weights(40, 96, dtype=torch.float32)
    config: dict[str, Any] = {"group_size": 32, "bits": 3, "sym": sym, **layout}
    (plain,) = quantize_linears([W], H, QuantizeConfig(**{**config, "sweeps": 0, "refit": False}))
    (better,) = quantize_linears([W], H, QuantizeConfig(**{**config, **options}))
    damped = H.double() + 0.05 * H.diagonal().double().mean() * torch.eye(96, dtype=torch.float64)
    before, after = (row_losses(W, q.dequantize(), damped) for q in (plain, better))
    assert (after <= before * (1 + 1e-5)).all()
    assert float(after.sum()) < 0.99 * float(before.sum())
    assert torch.equal(plain.zeros, better.zeros)
    if not options.get("refit", True):
        assert torch.equal(plain.scales, better.scales)


def test_a_row_that_got_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rounding does inside a pass, rows are compared before and after."""
    X = activations(300, 64, dtype=torch.float32)
    H, W = X.T @ X / 300, weights(12, 64, dtype=torch.float32)
    (plain,) = quantize_linears([W], H, QuantizeConfig(group_size=32, sweeps=0, refit=False))

    def spoil(solution: Any, *_: Any, **__: Any) -> None:
        solution.D[:, 3:] *= 5
        solution.D[:, :3] *= 0.5
        solution.codes[:] = 1
        solution.scales.mul_(2)

    monkeypatch.setattr(rounding, "refine_once", spoil)
    (kept,) = quantize_linears([W], H, QuantizeConfig(group_size=32, sweeps=1))
    assert torch.equal(kept.codes[3:], plain.codes[3:])
    assert torch.equal(kept.scales[3:], plain.scales[3:])
    assert (kept.codes[:3] == 1).all()
    assert torch.equal(kept.scales[:3], plain.scales[:3] * 2)
    errors, energy = row_losses(W, plain.dequantize(), H), row_losses(W, torch.zeros_like(W), H)
    told = float(errors[:3].sum() / 4 + errors[3:].sum()) / float(energy.sum())
    assert kept.loss == pytest.approx(told, rel=1e-4)


def test_a_scale_never_changes_sign_and_never_vanishes() -> None:
    s = torch.tensor([0.1, -0.1, 0.1, 1e-7])
    along, curve = torch.tensor([-1.0, 1.0, 1.0, -1e-7]), torch.ones(4)
    assert (s + _scale_step(s, along, curve)).tolist() == pytest.approx([0.1, -0.1, 1.1, 1e-7], rel=1e-3)


def test_refit_scales_keep_their_sign() -> None:
    X = activations(300, 64, dtype=torch.float32)
    H, W = X.T @ X / 300, weights(40, 64, dtype=torch.float32)
    (got,) = quantize_linears([W], H, QuantizeConfig(bits=2, group_size=16, positive_scales=True, sweeps=3))
    assert (got.scales > 0).all()
