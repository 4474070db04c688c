from __future__ import annotations

import torch

from gptq_cli.engine.finite import blame_sample


def test_the_first_bad_sample_is_named() -> None:
    x = torch.zeros(4, 3, 2)
    x[2, 1, 0] = torch.nan
    x[3, 0, 0] = torch.inf
    error = blame_sample(x, (8, 9, 10, 12), "model.layers.3", "mlp.down_proj")
    assert error.exit_code == 5
    for part in ("sample 10", "'mlp.down_proj'", "'model.layers.3'"):
        assert part in error.message


def test_an_overflow_of_squares_is_told_from_a_bad_value() -> None:
    error = blame_sample(torch.full((2, 3, 2), 1e30), (4, 6), "b", "l")
    assert "overflows" in error.message
    assert "the samples 4, 6" in (error.hint or "")
