"""What the first block shows: warnings name options with values below those in use."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.events import DeviceMemory
from gptq_cli.jobs.forecast import Forecast
from gptq_cli.placement.device import CPU
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import cpu_baseline_bytes
from tests.preflight.shapes import llama

GIB = 2**30
ANEW = " --resume never (the work begins anew)"


def forecast(samples: int, batch: int) -> Forecast:
    plan: Any = SimpleNamespace(device="cuda:0", predicted_peak_bytes=GIB)
    return Forecast(
        facts=llama(blocks=1, hidden=64, inner=128),
        work=Work(QuantizeConfig(), CalibrationConfig(samples=samples)),
        schedule=Schedule(micro_batch_samples=batch, seq_len=8, blocks=()),
        device=CPU,
        plans=(plan,),
    )


@pytest.mark.parametrize(
    ("samples", "batch", "says"),
    [
        (128, 4, f"may not fit: --batch-size 2 or --samples 64{ANEW} takes less"),
        (128, 1, f"may not fit: --samples 64{ANEW} takes less"),
        (1, 2, "may not fit: --batch-size 1 takes less"),
        (1, 1, "a larger block may not fit"),
    ],
)
def test_more_memory_than_planned(samples: int, batch: int, says: str) -> None:
    used = DeviceMemory(
        device="cuda:0", allocated_bytes=0, reserved_bytes=0, peak_bytes=2 * GIB, total_bytes=4 * GIB
    )
    (warned,) = forecast(samples, batch).memory_warnings([used])
    assert warned.hint.endswith(says)


def test_a_large_tokenizer_is_in_the_plan_and_nobody_elses() -> None:
    plan: Any = SimpleNamespace(device="cpu", predicted_peak_bytes=GIB)
    facts = llama(blocks=1, hidden=64, inner=128, vocab=262_144)
    known = replace(forecast(16, 1), facts=facts, plans=(plan,), before_bytes=cpu_baseline_bytes(facts))
    used = DeviceMemory(
        device="cpu", allocated_bytes=0, reserved_bytes=0, peak_bytes=3 * GIB, total_bytes=8 * GIB
    )
    (warned,) = known.memory_warnings([used])
    assert "took 3.00 GiB on cpu, 1.00 GiB were planned" in warned.message


@pytest.mark.parametrize(
    ("samples", "says"), [(16, f"may be why; --samples 8{ANEW} takes less"), (1, "may be why")]
)
def test_more_time_than_planned(samples: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forecast, "seconds", lambda self: {"model.layers.0": 1.0})
    done: Any = SimpleNamespace(name="model.layers.0", seconds=9.0)
    (warned,) = forecast(samples, 1).time_warnings(done, [])
    assert warned.hint.endswith(says)
