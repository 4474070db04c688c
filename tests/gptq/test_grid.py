"""Scales that fp16 can hold, one division, and a separate search for every group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.grid import Grid, minmax_parameters, round_scale_to_fp16, round_to_nearest
from gptq_cli.gptq.search import group_parameters
from tests.gptq.cases import weights


def grid(**options: Any) -> Grid:
    return Grid.of(QuantizeConfig(**options))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_stored_scale_is_an_fp16_number_that_can_divide(scale: float) -> None:
    got = round_scale_to_fp16(torch.tensor([scale]))
    assert torch.equal(got, got.half().float())
    assert bool(torch.isfinite(got).all())
    assert float(got) != 0
    assert scale == 0 or (float(got) > 0) == (scale > 0)
    if 2**-14 <= abs(scale) <= 65504:
        assert float(got) == pytest.approx(scale, rel=2**-11)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
def test_codes_stay_within_their_bits(bits: int, sym: bool, search: Any) -> None:
    W = weights(64, 24, dtype=torch.float32)
    chosen = grid(bits=bits, sym=sym, scale_search=search)
    scales, zeros = group_parameters(W, torch.rand(64) + 0.1, 16, chosen)
    solution = round_to_nearest(W, scales, zeros, 16, chosen)
    assert int(solution.codes.max()) <= 2**bits - 1
    assert ((zeros >= 0) & (zeros <= 2**bits - 1)).all()
    assert torch.equal(zeros, zeros.round())
    if sym:
        assert (zeros == 2 ** (bits - 1)).all()
    Q = (solution.codes.float() - zeros.repeat_interleave(16, 0)) * scales.repeat_interleave(16, 0)
    torch.testing.assert_close(W - Q, solution.D, rtol=0, atol=1e-7)


def test_signed_scales_put_the_extreme_weight_on_the_lowest_level() -> None:
    W = torch.tensor([[-8.0, 8.0], [1.0, -1.0], [3.0, -3.0], [5.0, -5.0]])
    scales, zeros = group_parameters(W, torch.ones(4), 4, grid(group_size=4))
    assert scales.tolist() == [[1.0, -1.0]]
    solution = round_to_nearest(W, scales, zeros, 4, grid(group_size=4))
    assert solution.codes[0].tolist() == [0, 0]
    assert not solution.D.any()


def test_positive_scales_are_positive() -> None:
    W = weights(64, 64, dtype=torch.float32)
    for bits in (2, 3, 4, 8):
        signed, _ = group_parameters(W, torch.ones(64), 16, grid(bits=bits))
        positive, _ = group_parameters(W, torch.ones(64), 16, grid(bits=bits, positive_scales=True))
        assert (signed < 0).any()
        assert (positive > 0).all()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_beats_the_range_by_its_own_measure(sym: bool, bits: int) -> None:
    W, energy = weights(64, 32, dtype=torch.float32), torch.rand(64) * 5

    def measure(search: Any) -> float:
        chosen = grid(bits=bits, sym=sym, scale_search=search)
        D = round_to_nearest(W, *group_parameters(W, energy, 16, chosen), 16, chosen).D
        return float((energy.sqrt()[:, None] * D.abs() ** 2.5).sum())

    assert measure("hessian") < 0.9 * measure("minmax")
    assert measure("hessian") < measure("mse")


@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("sym", [True, False])
def test_groups_are_found_one_by_one(search: Any, sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the work is cut into chunks, and whatever stands beside a group."""
    W, energy = weights(50, 33, dtype=torch.float32), torch.rand(50)
    chosen = grid(sym=sym, scale_search=search)
    scales, zeros = group_parameters(W, energy, 16, chosen)
    monkeypatch.setattr("gptq_cli.gptq.search._CHUNK_VALUES", 160)
    cut = group_parameters(W, energy, 16, chosen)
    assert torch.equal(scales, cut[0])
    assert torch.equal(zeros, cut[1])
    lone = group_parameters(W[48:], energy[48:], 16, chosen)
    assert torch.equal(scales[3:], lone[0])


def test_a_group_without_energy_is_searched_on_its_weights() -> None:
    W = weights(16, 8, dtype=torch.float32)
    silent, _ = group_parameters(W, torch.zeros(16), 16, grid())
    even, _ = group_parameters(W, torch.ones(16), 16, grid())
    assert torch.equal(silent, even)


def test_minmax_asymmetric_covers_both_ends() -> None:
    W = torch.tensor([[-1.0], [0.5], [2.0], [0.0]])
    scale, zero = minmax_parameters(W[None], grid(sym=False))
    assert float(scale) == pytest.approx(0.2, rel=1e-3)
    assert float(zero) == 5
    allpos = minmax_parameters(W[None] + 2, grid(sym=False))
    assert float(allpos[1]) == 0
