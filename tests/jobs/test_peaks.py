"""The peak that a report names is the job's own, whatever the process did before."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.devices import host_memory
from gptq_cli.devices.host_memory import peak_resident_bytes, resident_bytes, trim_heap
from gptq_cli.engine import loop
from gptq_cli.engine import run as engine_run
from gptq_cli.events import BlockStarted, DeviceMemory, Event, PhaseStarted, ignore
from gptq_cli.jobs import quantize
from gptq_cli.jobs.run_report import Tally
from gptq_cli.results.run import RunReport

MIB = 1 << 20
BALLAST = 400 * MIB
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux resets the mark")


def run(model: Path, out: Path, observer: Any = ignore) -> RunReport:
    return quantize(
        QuantizeJob(
            model=ModelRef(model=str(model)),
            out=str(out),
            quantize=QuantizeConfig(group_size=32),
            calibration=CalibrationConfig(samples=2, seq_len=32),
        ),
        observer,
    )


def take_ballast() -> None:
    """Raise the mark of the process far above what a tiny job needs, and give everything back."""
    ballast = bytearray(BALLAST)
    ballast[::4096] = b"x" * len(ballast[::4096])
    del ballast
    gc.collect()
    trim_heap()


@LINUX
@pytest.mark.parametrize("resettable", [True, False])
def test_the_second_job_of_a_process_has_a_peak_of_its_own(
    resettable: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot reset the mark (macOS, some containers), readings on the way are the peak."""

    def heavy(event: Event) -> None:
        if isinstance(event, BlockStarted) and event.index == 0:
            take_ballast()

    host_memory.reset_peak_resident()
    if not resettable:
        monkeypatch.setattr(host_memory, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    first = dict(run(tiny_llama, tmp_path / "a", heavy).measured_peak_bytes)["cpu"]
    before = resident_bytes()
    second = dict(run(tiny_llama, tmp_path / "b").measured_peak_bytes)["cpu"]
    assert first > before + BALLAST - 50 * MIB
    assert before - 50 * MIB < second < first - BALLAST // 2


@LINUX
def test_what_happens_before_the_first_block_counts(tiny_llama: Path, tmp_path: Path) -> None:
    take_ballast()
    base = resident_bytes()

    def heavy(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase == "calibration":
            take_ballast()

    peak = dict(run(tiny_llama, tmp_path / "q", heavy).measured_peak_bytes)["cpu"]
    assert peak > base + BALLAST - 50 * MIB


def test_accelerators_are_reset_before_the_weights_are_read_and_before_each_block(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(engine_run, "reset_peak", lambda devices: seen.append("reset"))
    monkeypatch.setattr(loop, "reset_peak", lambda devices: seen.append("reset"))

    def note(event: Event) -> None:
        match event:
            case PhaseStarted("load"):
                seen.append("load")
            case BlockStarted():
                seen.append("block")
            case _:
                pass

    run(tiny_llama, tmp_path / "q", note)
    assert seen == ["reset", "load", *["reset", "block"] * 3]


def reading(device: str, allocated: int, peak: int) -> DeviceMemory:
    return DeviceMemory(
        device=device, allocated_bytes=allocated, reserved_bytes=allocated, peak_bytes=peak, total_bytes=1000
    )


def test_a_mark_that_has_not_risen_is_not_this_runs_peak() -> None:
    tally = Tally(ignore, host_peak_bytes=500)
    tally.record([reading("cpu", 200, 500), reading("cuda:0", 20, 50)])
    tally.record([reading("cpu", 300, 500), reading("cuda:0", 30, 40)])
    assert tally.peak_bytes == {"cpu": 300, "cuda:0": 50}
    tally.record([reading("cpu", 250, 600)])
    assert tally.peak_bytes["cpu"] == 600


@LINUX
def test_the_mark_is_reset() -> None:
    take_ballast()
    high = peak_resident_bytes()
    mark = host_memory.reset_peak_resident()
    assert mark < high - BALLAST // 2
    assert abs(mark - resident_bytes()) < 50 * MIB
