from __future__ import annotations

import pytest
import torch

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine.finite import FiniteNotes, named_error, non_finite_error
from gptq_cli.engine.mixed import solve_mixed
from gptq_cli.errors import NonFinite, WeightTooLarge


def test_the_first_bad_sample_is_named() -> None:
    x = torch.zeros(4, 3, 2)
    x[2, 1, 0] = torch.nan
    x[3, 0, 0] = torch.inf
    error = non_finite_error((x, None, None), (8, 9, 10, 12), "model.layers.3", "mlp.down_proj")
    assert error.exit_code == 5
    for part in ("sample 10", "'mlp.down_proj'", "'model.layers.3'"):
        assert part in error.message


def test_the_weight_that_is_too_large_is_named_with_the_way_out() -> None:
    weights = [torch.ones(2, 2), torch.full((2, 2), -1e9), torch.ones(2, 2)]
    error = named_error(WeightTooLarge("the weight reaches 1e+09"), ["gate", "up", "down"], weights)
    assert error.message == "up: the weight reaches 1e+09"
    assert error.hint == "leave it dense: --module up=dense"
    other = named_error(NonFinite("the Hessian holds NaN", hint="x"), ["gate", "up"], weights[:2])
    assert (other.message, other.hint) == ("gate, up: the Hessian holds NaN", "x")


def test_with_mixed_bits_the_weight_that_is_too_large_need_not_be_the_largest() -> None:
    """8 bits reach sixteen times as far as 4."""
    weights = [
        torch.ones(2, 32),
        torch.full((2, 32), 1e6),
        torch.full((2, 32), -6e5),
        torch.full((2, 32), 9e5),
    ]
    configs = [QuantizeConfig(bits=bits, group_size=32) for bits in (4, 8, 4, 4)]
    with pytest.raises(WeightTooLarge) as caught:
        solve_mixed(weights, torch.eye(32), configs)
    error = named_error(caught.value, ["q", "k", "v", "w"], weights)
    assert error.message.startswith("v: the weight reaches 6e+05")


def test_an_overflow_of_squares_is_told_from_a_bad_value() -> None:
    error = non_finite_error((torch.ones(2, 3, 2), torch.full((2, 3, 2), 1e30)), (4, 6), "b", "l")
    assert "overflows" in error.message
    assert "reaches 1e+30" in error.message
    assert "one of the samples 4, 6" in (error.hint or "")


def test_the_dense_stream_is_searched_as_well() -> None:
    dense = torch.zeros(2, 3, 2)
    dense[1, 0, 0] = torch.nan
    assert (
        "for sample 6 of the calibration"
        in non_finite_error((torch.ones(2, 3, 2), dense), (4, 6), "b", "l").message
    )


def test_no_sample_is_invented_where_tokens_are_routed() -> None:
    x = torch.zeros(5, 2)
    x[4, 0] = torch.inf
    assert (
        "for one of the samples 4, 6 of the calibration"
        in non_finite_error((x, None), (4, 6), "b", "l").message
    )


def test_a_residual_is_told_from_an_input() -> None:
    error = non_finite_error((torch.ones(2, 3, 2), torch.ones(2, 3, 2)), (4, 6), "b", "o_proj")
    assert "the residual beside 'o_proj' in block 'b' is not finite" in error.message
    assert "one of the samples 4, 6" in error.message


def test_notes_name_the_first_place_that_was_bad() -> None:
    notes = FiniteNotes[str]()
    assert notes.first_bad() is None
    for place, good in (("a", True), ("b", True), ("c", False), ("d", False)):
        notes.add(place, torch.tensor(good))
    assert notes.first_bad() == "c"
