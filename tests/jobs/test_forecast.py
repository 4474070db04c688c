"""What the first block shows: warnings name options with values below those in use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.events import DeviceMemory
from gptq_cli.jobs.forecast import Forecast
from gptq_cli.placement.device import CPU
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Work
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


@pytest.mark.parametrize(
    ("samples", "says"), [(16, f"may be why; --samples 8{ANEW} takes less"), (1, "may be why")]
)
def test_more_time_than_planned(samples: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forecast, "seconds", lambda self: {"model.layers.0": 1.0})
    done: Any = SimpleNamespace(name="model.layers.0", seconds=9.0)
    (warned,) = forecast(samples, 1).time_warnings(done, [])
    assert warned.hint.endswith(says)
