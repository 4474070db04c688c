"""What is said of a linear that could not be solved, or of which nothing is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine.linear_report import check_fallback
from gptq_cli.errors import NotPositiveDefinite
from gptq_cli.events import Event, Warned
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.model.skeleton import LinearInfo

NAME = "model.layers.1.mlp.up_proj"
INFO = LinearInfo(
    name=NAME,
    block="model.layers.1",
    source_key=f"{NAME}.weight",
    in_features=64,
    out_features=32,
    bias=False,
    transposed=False,
)
CONFIG = QuantizeConfig(group_size=32)


def solved(W: Tensor, H: Tensor) -> QuantizedLinear:
    (found,) = quantize_linears([W], H, CONFIG)
    return found


def weights() -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("tokens", "why"),
    [(384, "every input of it is 0, for all 384 tokens"), (0, "no calibration token reached it")],
)
def test_a_fallback_without_inputs_does_not_speak_of_damping(tokens: int, why: str) -> None:
    found = solved(weights(), torch.zeros(64, 64))
    events: list[Event] = []
    check_fallback(INFO, found, tokens, events.append, strict=False)
    (event,) = events
    assert isinstance(event, Warned)
    assert event.message == f"{NAME!r} falls back to round-to-nearest: {why}"
    assert "damp" not in event.message + event.hint
    assert ("--calibration" in event.hint) == (tokens == 0)
    with pytest.raises(NotPositiveDefinite, match=why):
        check_fallback(INFO, found, tokens, events.append, strict=True)
