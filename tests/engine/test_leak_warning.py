"""A device whose memory grows after every block's flush is named in a warning, once."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.devices import leaks
from gptq_cli.engine import loop
from gptq_cli.events import DeviceMemory, Event, Warned
from gptq_cli.jobs import quantize


@pytest.mark.parametrize(("growth", "warned"), [(8 << 20, 1), (0, 0)])
def test_growth_is_told(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growth: int, warned: int
) -> None:
    rounds = count()

    def flush(devices: object) -> Any:
        size = (100 << 20) + growth * next(rounds)
        reading = DeviceMemory(
            device="xpu:0", allocated_bytes=size, reserved_bytes=size, peak_bytes=size, total_bytes=1 << 34
        )
        return (reading,), (reading,)

    monkeypatch.setattr(loop, "flush", flush)
    monkeypatch.setattr(leaks, "BLOCKS_IN_A_ROW", 2)
    events: list[Event] = []
    job = QuantizeJob(
        model=ModelRef(model=str(tiny_llama)),
        out=str(tmp_path / "out"),
        quantize=QuantizeConfig(group_size=32),
        calibration=CalibrationConfig(samples=2, seq_len=32),
    )
    quantize(job, events.append)
    told = [e.message for e in events if isinstance(e, Warned) and "grows by" in e.message]
    assert len(told) == warned
    assert all("xpu:0 grows by 8.00 MiB per block" in text for text in told)
