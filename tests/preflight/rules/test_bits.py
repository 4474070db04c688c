"""A budget of bits: what is out of reach, what cannot be measured, and for which there is no memory."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_cli.planning.cases import DeviceNeed
from gptq_cli.preflight.rules.bits import (
    BitsCase,
    MeasuringCase,
    bits_measurable,
    bits_memory,
    bits_reachable,
)

GIB = 1 << 30


def case(asked: float, **fields: Any) -> BitsCase:
    return BitsCase(
        **{
            "asked": asked,
            "parameters": 8000,
            "least_bytes": 3456,
            "most_bytes": 16_300,
            "dense_bytes": 1000,
            "targets": (),
            "architecture": "LlamaForCausalLM",
            **fields,
        }
    )


@pytest.mark.parametrize("asked", [3.456, 4.0, 16.2])
def test_what_can_be_reached(asked: float) -> None:
    assert not bits_reachable(case(asked))


def test_too_little_names_the_least_and_why() -> None:
    (finding,) = bits_reachable(case(3.4, targets=("vllm", "sglang")))
    assert finding.level == "error"
    assert finding.subject == "--bits-per-weight 3.4"
    assert "the smallest file has 3.456 bits per parameter" in finding.message
    assert "1.000 of them" in finding.message
    assert "allowed for vllm, sglang: 3.456 to 16.300" in finding.message
    assert finding.hint == "--bits-per-weight 3.456 or more"


def test_the_range_that_is_named_can_be_reached() -> None:
    """It is rounded inwards, so that whoever types it is not refused again."""
    odd = {"parameters": 7919, "least_bytes": 3457, "most_bytes": 16_301}
    (finding,) = bits_reachable(case(1.0, **odd))
    least, most = finding.message.rpartition("allowed: ")[2].split(" to ")
    assert not bits_reachable(case(float(least), **odd))
    assert not bits_reachable(case(float(most) - 1e-9, **odd))


def test_so_much_that_everything_stays_dense() -> None:
    for asked in (16.3, 99.0):
        (finding,) = bits_reachable(case(asked))
        assert "nothing would have to be quantized: everything dense has 16.300" in finding.message


def test_a_target_that_lets_nothing_be_dense_takes_any_larger_budget() -> None:
    assert not bits_reachable(case(99.0, most_bytes=None))
    (finding,) = bits_reachable(case(1.0, most_bytes=None, targets=("transformers",)))
    assert finding.message.endswith("allowed for transformers: 3.456 or more")


def test_what_cannot_be_measured() -> None:
    assert not bits_measurable(case(4.0))
    (driven,) = bits_measurable(case(4.0, between="it adds what was there before"))
    assert "it adds what was there before" in driven.message
    (headless,) = bits_measurable(case(4.0, head=False))
    assert "no output head that is a linear" in headless.message
    assert "--bits 4" in headless.hint


def test_memory() -> None:
    needs = (DeviceNeed("cuda:0", 9 * GIB, 8 * GIB), DeviceNeed("cpu", GIB, 8 * GIB))
    (finding,) = bits_memory(MeasuringCase(needs=needs))
    assert (finding.subject, finding.level) == ("cuda:0", "error")
    assert "needs 9.00 GiB of 8.00 GiB" in finding.message
