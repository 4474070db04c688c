"""Memory of devices: emptied when due, measured afresh, at most what was predicted, given back in the end."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_cli import jobs
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.engine import block, mixed, model_tail, run
from gptq_cli.errors import OutOfDeviceMemory
from gptq_cli.gptq.hessian import Hessian
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.planning import planner, tuning
from tests.e2e.commands import gptq
from tests.fakecuda.devices import Devices
from tests.fakecuda.runs import Reference, different, group_size_for, quantize, words_for
from tests.gpu.models import SMALL, save_random

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

Tiny = Callable[..., Path]
OFFLOAD = "model.layers.1=cpu,rest=0"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for its tensors to count beside what is rounded, small enough for seconds."""
    return save_random(tmp_path_factory.mktemp("small") / "model", **SMALL)


@pytest.mark.parametrize("device_map", ["cuda:0", OFFLOAD, "model.layers.1=1,rest=0"])
def test_every_flush_is_told_and_every_one_told_is_one(
    device_map: str,
    devices: Devices,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Tiny,
    text: Path,
    tmp_path: Path,
) -> None:
    """From the end of capture on; before, accelerate flushes by itself for each tensor that it dispatches."""
    before: list[int] = []
    blocks = run.quantize_blocks

    def begun(*args: Any) -> Any:
        before.append(devices.flushes)
        return blocks(*args)

    monkeypatch.setattr(run, "quantize_blocks", begun)
    options = ("--device-map", device_map, "--progress", "jsonl")
    done = quantize(tiny("llama"), tmp_path / "out", text, *options)
    told = [event for event in done.events if event["event"] == "CacheFlushed"]
    assert [event["where"] for event in told] == ["capture", "block", "block", "block", "end"]
    assert devices.flushes - before[0] == len(told)
    for event in told:
        on_devices = [entry for entry in event["after"] if entry["device"] != "cpu"]
        assert all(entry["reserved_bytes"] == entry["allocated_bytes"] for entry in on_devices)
    assert all(entry["allocated_bytes"] == 0 for entry in told[-1]["after"] if entry["device"] != "cpu")


def test_a_peak_is_that_of_the_run_and_of_the_block(small: Path, text: Path, tmp_path: Path) -> None:
    """The second run needs less than the first, and so do its blocks: a peak that stayed would show."""
    held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    del held
    sizes = (("--samples", "32", "--seq-len", "128"), ("--samples", "8", "--seq-len", "32"))
    large, less = (
        quantize(small, tmp_path / str(number), text, "--device-map", "cuda:0", *size).report
        for number, size in enumerate(sizes)
    )
    assert (
        dict(less["measured_peak_bytes"])["cuda:0"] < dict(large["measured_peak_bytes"])["cuda:0"] < 1 << 29
    )
    for report in (large, less):
        whole = dict(report["measured_peak_bytes"])["cuda:0"]
        assert all(dict(block["peak_bytes"])["cuda:0"] <= whole for block in report["blocks"])


@pytest.mark.parametrize(
    ("device_map", "options"),
    [
        ("cuda:0", ()),
        ("cuda:0", ("--solve-for", "own")),
        ("cuda:0", ("--no-true-sequential",)),
        ("cuda:0", ("--group-size", "-1", "--desc-act")),
        ("model.layers.1-2=cpu,rest=0", ()),
        ("model.layers.1-2=1,rest=0", ()),
        ("model.embed_tokens=cpu,lm_head=cpu,model.layers.1=1,rest=0", ()),
        ("cuda:0", ("--recipe", "best")),
        ("model.layers.1-2=1,rest=0", ("--recipe", "best")),
    ],
)
def test_what_is_measured_is_at_most_what_was_predicted(
    device_map: str, options: tuple[str, ...], small: Path, text: Path, tmp_path: Path
) -> None:
    size = ("--samples", "32", "--seq-len", "128", "--device-map", device_map)
    report = quantize(small, tmp_path / "out", text, *size, *options).report
    predicted, measured = dict(report["predicted_peak_bytes"]), dict(report["measured_peak_bytes"])
    for device in report["devices"]:
        if device != "cpu":
            assert 0 < measured[device] <= predicted[device]


@pytest.mark.parametrize("recipe", ["best", "max"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "mixtral"])
def test_so_with_gradients_and_tuning(
    name: str, recipe: str, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (model_tail, tuning):  # beside half a GiB of logits nothing else would be seen
        monkeypatch.setattr(module, "TUNE_LOGITS", 64 * 512)
    size = ("--samples", "32", "--seq-len", "128", "--sweeps", "0", "--group-size", group_size_for(name))
    run = quantize(tiny(name), tmp_path / "out", text, "--device-map", "cuda:0", "--recipe", recipe, *size)
    predicted, measured = (dict(run.report[f"{word}_peak_bytes"]) for word in ("predicted", "measured"))
    assert 0.5 * predicted["cuda:0"] < measured["cuda:0"] <= predicted["cuda:0"]


@pytest.mark.parametrize("name", ["gemma2", "bloom", "gpt2"])
@pytest.mark.parametrize(("way", "replayed"), [(0, None), (-1, "memory")], ids=["parked", "replayed"])
def test_so_where_scores_are_tensors_and_activation_functions_take_steps(
    name: str,
    way: int,
    replayed: str | None,
    tiny: Tiny,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long samples: the scores of attention are their square. Few of them in a micro-batch: what is held for
    each sample until the block is done counts."""
    monkeypatch.setattr(planner, "WAYS", (planner.WAYS[way],))
    size = ("--samples", "16", "--seq-len", "192", "--batch-size", "4", "--device-map", "cuda:0")
    report = quantize(tiny(name), tmp_path / "out", text, *size).report
    assert {block["replayed"] for block in report["schedule"]["blocks"]} == {replayed}
    predicted, measured = dict(report["predicted_peak_bytes"]), dict(report["measured_peak_bytes"])
    assert 0 < measured["cuda:0"] <= predicted["cuda:0"]


class Squeezed:
    """Has the device full when a function is called."""

    def __init__(self, devices: Devices, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
        self.devices, self.monkeypatch, self.index = devices, monkeypatch, index

    def at(self, owner: Any, name: str, spare_bytes: int = 0, skip: int = 0) -> None:
        """From the call number `skip` on."""
        original = getattr(owner, name)
        calls = iter(range(1_000_000))

        def squeezed(*args: Any, **options: Any) -> Any:
            if next(calls) == skip:
                self.devices.squeeze(self.index, spare_bytes)
            return original(*args, **options)

        self.monkeypatch.setattr(owner, name, squeezed)


POINTS: dict[str, tuple[Any, str, int]] = {
    "load": (run, "open_stream", 0),
    "capture": (run, "capture", 0),
    "trace": (block, "find_stages", 1),
    "collect": (Hessian, "add", 5),
    "goal": (block.StageMoments, "goal", 2),
    "solve": (mixed, "quantize_linears", 4),
    "pack": (block, "pack", 9),
}
"""Where memory runs out: owner, function, at which of its calls."""


def allocated() -> list[int]:
    return [torch.cuda.memory_allocated(index) for index in range(2)]


@pytest.mark.parametrize(
    ("device_map", "index", "point"),
    [
        *(("cuda:0", 0, point) for point in POINTS),
        *(("model.layers.1=cpu,rest=1", 1, point) for point in POINTS),
        *(("model.layers=1,rest=0", 1, point) for point in ("load", "collect", "solve")),
    ],
)
def test_out_of_memory_is_exit_4_and_leaves_the_device_free(
    point: str,
    device_map: str,
    index: int,
    devices: Devices,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Tiny,
    text: Path,
    tmp_path: Path,
) -> None:
    owner, name, skip = POINTS[point]
    monkeypatch.setattr(run, "lighter", lambda schedule: None)  # what is tried before: test_resume.py
    Squeezed(devices, monkeypatch, index).at(owner, name, skip=skip)
    gc.disable()  # what lies in cycles is not to be found by luck
    try:
        ran = gptq(*words_for(tiny("llama"), tmp_path / "out", text, "--device-map", device_map))
        left = allocated()
    finally:
        gc.enable()
    assert ran.code == 4, ran.stderr
    assert re.search("out of memory [a-z].*: CUDA out of memory", ran.stderr)
    assert "hint: " in ran.stderr
    assert devices.ooms(index) > 0
    assert left == [0, 0]
    later = point in ("trace", "collect", "goal", "solve", "pack")  # in the second block, or the first
    assert {path.name for path in tmp_path.iterdir()} <= ({".out.gptq"} if later else set())
    if point == "solve":
        monkeypatch.undo()
        devices.relax()
        quantize(tiny("llama"), tmp_path / "again", text, "--device-map", device_map)


@pytest.mark.parametrize(
    ("point", "skip"), [("trace", 1), ("collect", 9), ("goal", 4), ("solve", 4), ("pack", 9)]
)
def test_the_same_command_goes_on_where_memory_ran_out(
    point: str,
    skip: int,
    devices: Devices,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Tiny,
    text: Path,
    tmp_path: Path,
    reference: Reference,
) -> None:
    """In the second block: the first one is kept, and the checkpoint is that of a run without a stop."""
    owner, name, _ = POINTS[point]
    with monkeypatch.context() as once:
        once.setattr(run, "lighter", lambda schedule: None)
        Squeezed(devices, once, 0).at(owner, name, skip=skip)
        words = words_for(tiny("llama"), tmp_path / "out", text, "--device-map", "cuda:0")
        ran = gptq(*words)
    assert ran.code == 4, ran.stderr
    assert allocated() == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [".out.gptq"]
    devices.relax()
    again = quantize(tiny("llama"), tmp_path / "out", text, "--device-map", "cuda:0")
    assert [start["first_block"] for start in again.report["starts"]] == [0, 1]
    assert different(again, reference("llama")) == []


def test_an_error_that_is_kept_keeps_no_memory(
    devices: Devices, monkeypatch: pytest.MonkeyPatch, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    """As a notebook keeps it: the next cell needs the device."""
    monkeypatch.setattr(run, "lighter", lambda schedule: None)
    Squeezed(devices, monkeypatch, 0).at(mixed, "quantize_linears", skip=3)
    job = QuantizeJob(
        model=ModelRef(model=str(tiny("llama"))),
        out=str(tmp_path / "out"),
        quantize=QuantizeConfig(group_size=32),
        calibration=CalibrationConfig.of(str(text), samples=8, seq_len=48),
        device_map=DeviceMap.parse("cuda:0"),
    )
    with pytest.raises(OutOfDeviceMemory) as caught:
        jobs.quantize(job)
    assert caught.value.__cause__ is not None
    assert allocated() == [0, 0]
    assert torch.cuda.memory_reserved(0) == 0


def test_two_jobs_in_one_process_do_not_disturb_each_other(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    torch.cuda.manual_seed_all(11)
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    threads, frozen = torch.get_num_threads(), gc.get_freeze_count()
    with torch.accelerator.device_index(1):
        first = quantize(llama, tmp_path / "1", text, "--device-map", "model.layers.1=1,rest=0")
        second = quantize(llama, tmp_path / "2", text, "--device-map", OFFLOAD)
        other = quantize(gpt2, tmp_path / "3", text, "--device-map", "cuda:1")
        third = quantize(llama, tmp_path / "4", text, "--device-map", "auto")
        assert torch.accelerator.current_device_index() == 1
    assert different(first, second) == different(first, third) == []
    assert other.devices == ["cuda:1"]
    assert allocated() == [0, 0]
    assert all(
        torch.equal(before, after)
        for before, after in zip(
            states, [torch.get_rng_state(), *torch.cuda.get_rng_state_all()], strict=True
        )
    )
    assert (torch.get_num_threads(), gc.get_freeze_count()) == (threads, frozen)
    assert first.report["predicted_peak_bytes"] != second.report["predicted_peak_bytes"]


def test_two_jobs_at_once(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """In two threads, each on a device of its own: a current device belongs to a thread."""
    from concurrent.futures import ThreadPoolExecutor

    def job(number: int) -> object:
        made = QuantizeJob(
            model=ModelRef(model=str(tiny("llama"))),
            out=str(tmp_path / str(number)),
            quantize=QuantizeConfig(group_size=32),
            calibration=CalibrationConfig.of(str(text), samples=8, seq_len=48),
            device_map=DeviceMap.parse(f"cuda:{number}"),
        )
        return jobs.quantize(made).devices

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(job, range(2))) == [("cuda:0",), ("cuda:1",)]
