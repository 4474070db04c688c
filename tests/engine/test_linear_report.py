"""What is said of a linear that could not be solved, or of which nothing is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine.keep import check_strict
from gptq_cli.engine.linear_report import check_fallback, check_lost, linear_report
from gptq_cli.errors import LinearLost, NotPositiveDefinite
from gptq_cli.events import Event, Warned
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.results.run import BlockReport

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
    [
        (384, "every input of it is 0, for all 384 tokens"),
        (1, "every input of it is 0, for the one token"),
        (0, "no calibration token reached it"),
    ],
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


def test_a_linear_of_which_nothing_is_left_is_named() -> None:
    """float16 ends at 6e-8 below as it does at 65504 above; what is lost there is no fallback."""
    H = torch.eye(64)
    events: list[Event] = []

    def check(found: QuantizedLinear, *, strict: bool) -> None:
        check_lost(INFO, found.loss, found.scales, events.append, strict=strict)

    for scale in (1.0, 1e-4):
        check(solved(weights() * scale, H), strict=True)
    lost = solved(weights() * 1e-12, H)
    assert lost.method == "gptq"
    check(lost, strict=False)
    (event,) = events
    assert isinstance(event, Warned)
    assert event.message.startswith(
        f"{NAME!r} is lost, the relative error of its output is 1.0000: its weights"
    )
    assert "float16" in event.message
    assert event.hint == f"leave it dense: --module {NAME}=dense"
    with pytest.raises(LinearLost, match="is lost"):
        check(lost, strict=True)
    poor = replace(solved(weights(), H), loss=0.95)
    check(poor, strict=False)
    assert "float16" not in str(events[-1]), "only where that is the cause"


def test_strict_holds_for_what_an_earlier_start_lost() -> None:
    one = linear_report(
        INFO, CONFIG, replace(solved(weights(), torch.eye(64)), loss=0.95), tokens=9, seconds=1.0
    )
    finished = [BlockReport(name="model.layers.1", seconds=1.0, peak_bytes=(), linears=(one,))]
    check_strict(finished, strict=False)
    with pytest.raises(LinearLost, match=f"{NAME}' of the finished blocks had been lost"):
        check_strict(finished, strict=True)
