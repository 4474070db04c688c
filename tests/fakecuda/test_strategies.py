"""`auto`, `balanced` and `sequential` on devices so small that they spread: the checkpoint is the CPU's.

A block that is worked on needs as much of one device as of another, so a plan spreads when what lies outside
the blocks takes room as well: where a head is quantized, or the model's own code runs between the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.placement.device import CPU, Device
from tests.fakecuda.devices import Devices
from tests.fakecuda.runs import Reference, different, group_size_for, quantize
from tests.gpu.limits import largest_limit

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

Tiny = Callable[..., Path]
FIRST, SECOND, THIRD = (Device("cuda", index) for index in range(3))

MASK_BYTES = 2 * 8 * 48 * 48 * 4
"""Masks of attention, of two kinds where windows slide: plans leave them out; in tiny models they show."""

ONE = ("auto", 2, (FIRST,))
SPREAD = ("auto", 2, (FIRST, SECOND))
SPILL = ("auto", 1, (FIRST, CPU))
BALANCED = ("balanced", 2, (FIRST, SECOND))
BALANCED_SPILL = ("balanced", 2, (FIRST, SECOND, CPU))
SEQUENTIAL = ("sequential", 2, (FIRST, SECOND))
EVERY_MODEL = (SPREAD, SPILL, BALANCED, BALANCED_SPILL, SEQUENTIAL)
LLAMA = (ONE, ("balanced", 3, (FIRST, SECOND, THIRD)), ("balanced_low_0", 3, (SECOND, THIRD)))
"""(strategy, how many devices, to which of them it comes)."""
MODELS = ("llama", "gpt2", "gemma2", "mixtral", "qwen3_vl")
CASES = [(name, *case) for name in MODELS for case in (*EVERY_MODEL, *(LLAMA if name == "llama" else ()))]


@pytest.mark.parametrize(
    ("name", "strategy", "count", "wanted"),
    CASES,
    ids=lambda value: "+".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_a_strategy_changes_nothing(
    name: str,
    strategy: str,
    count: int,
    wanted: tuple[Device, ...],
    devices: Devices,
    tiny: Tiny,
    text: Path,
    tmp_path: Path,
    reference: Reference,
) -> None:
    devices.resize([2 << 30] * max(2, count))
    group_size = group_size_for(name)
    work = CalibrationConfig(samples=8, seq_len=48), QuantizeConfig(group_size=group_size, quantize_head=True)
    given = largest_limit(tiny(name), strategy, wanted, count, *work)
    options: tuple[object, ...] = ("--quantize-head", "--group-size", group_size)
    asked = ("--device-map", strategy, "--max-memory", given)
    run = quantize(tiny(name), tmp_path / "out", text, *asked, *options)
    assert run.devices == [str(device) for device in wanted]
    measured, predicted = (dict(run.report[f"{kind}_peak_bytes"]) for kind in ("measured", "predicted"))
    for device in set(run.devices) - {"cpu"}:
        assert 0 < measured[device] <= predicted[device] + MASK_BYTES
    assert different(run, reference(name, *options)) == []
