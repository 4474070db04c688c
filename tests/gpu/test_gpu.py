"""What only a CUDA machine can show: placement obeyed, offload that changes nothing, memory as predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptq_cli import jobs
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.device import CPU, Device
from gptq_cli.device_map import DeviceMap, MaxMemory
from gptq_cli.devices.accelerators import current_accelerator, present_devices, read_memory
from gptq_cli.devices.offload import replace_dispatch_hooks
from gptq_cli.errors import OutOfDeviceMemory
from gptq_cli.events import BlockStarted, CacheFlushed, Event
from gptq_cli.jobs import steps
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.model.source import find_model
from gptq_cli.model.weights import load_resident
from gptq_cli.placement import DeviceBudget
from gptq_cli.preflight.facts import model_facts
from gptq_cli.preflight.resolve import resolve
from tests.gpu.models import save_random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = Device("cuda", 0)
GIB = 1 << 30
Tiny = Callable[..., Path]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("medium") / "model")


def job_for(model: Path, out: Path, device_map: str, **changed: Any) -> QuantizeJob:
    made = QuantizeJob(
        model=ModelRef(model=str(model)),
        out=str(out),
        quantize=QuantizeConfig(group_size=32),
        calibration=CalibrationConfig(samples=8, seq_len=64),
        device_map=DeviceMap.parse(device_map),
    )
    return replace(made, **changed)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(out.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def test_everything_runs_on_one_device(tiny: Tiny, tmp_path: Path) -> None:
    events: list[Event] = []
    report = jobs.quantize(job_for(tiny("llama"), tmp_path / "out", "cuda:0"), events.append)
    assert report.devices == ("cuda:0",)
    assert {e.device for e in events if isinstance(e, BlockStarted)} == {"cuda:0"}
    assert report.fallbacks == 0
    assert tensors(tmp_path / "out")
    assert dict(report.measured_peak_bytes)["cuda:0"] > 0


def test_auto_chooses_the_current_accelerator(tiny: Tiny, tmp_path: Path) -> None:
    assert current_accelerator() == CUDA
    report = jobs.quantize(job_for(tiny("llama"), tmp_path / "out", "auto"))
    assert report.devices == ("cuda:0",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "device_map",
    [
        "model.layers.1=cpu,model.layers.2=cpu,rest=0",
        "model.embed_tokens=cpu,lm_head=cpu,rest=0",
        "model.layers.0=0,rest=cpu",
        '{"model.layers.0": "cuda:0", "model.layers": "cpu", "": 0}',
    ],
)
def test_offloaded_blocks_give_the_same_tensors(
    tiny: Tiny, tmp_path: Path, device_map: str, dtype: torch.dtype
) -> None:
    model = tiny("llama", dtype=dtype)
    jobs.quantize(job_for(model, tmp_path / "whole", "cuda:0"))
    events: list[Event] = []
    report = jobs.quantize(job_for(model, tmp_path / "offloaded", device_map), events.append)
    assert report.devices == ("cuda:0", "cpu")
    assert {e.device for e in events if isinstance(e, BlockStarted)} == {"cuda:0"}
    whole, offloaded = tensors(tmp_path / "whole"), tensors(tmp_path / "offloaded")
    assert whole.keys() == offloaded.keys()
    different = [name for name in whole if not torch.equal(whole[name], offloaded[name])]
    assert different == []


def test_nothing_is_left_on_the_card_after_the_hooks(tiny: Tiny) -> None:
    ref = ModelRef(model=str(tiny("llama")))
    skeleton = open_skeleton(find_model(ref), ref)
    device_map = DeviceMap.parse("model.layers.1=cpu,model.rotary_emb=cpu,lm_head=cpu,rest=0")
    placement = resolve(device_map, model_facts(skeleton), present_devices()).placement
    assert placement is not None
    assert placement.offloaded == ("model.rotary_emb", "model.layers.1", "lm_head")
    model = load_resident(skeleton, placement)
    with replace_dispatch_hooks(model, placement) as chain, torch.no_grad():
        ids = torch.arange(16, device="cuda").reshape(1, 16)
        first = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, first)
        assert next(model.lm_head.parameters()).device.type == "cuda"
        chain.send_home()
        homes = {p.device.type for name in chain.hooked for p in model.get_submodule(name).parameters()}
        assert homes == {"cpu"}
    for name in placement.offloaded:
        module = model.get_submodule(name)
        assert all(t.device.type == "cpu" for t in (*module.parameters(), *module.buffers()))
        assert not any(hasattr(part, "_hf_hook") for part in module.modules())


def test_flushes_give_reserved_memory_back(medium: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    asked = CalibrationConfig(samples=32, seq_len=512)
    jobs.quantize(job_for(medium, tmp_path / "out", "cuda:0", calibration=asked), events.append)
    flushes = [e for e in events if isinstance(e, CacheFlushed)]
    assert [e.where for e in flushes] == ["capture", *["block"] * 6, "end"]
    for flush in flushes:
        for before, after in zip(flush.before, flush.after, strict=True):
            if before.device == "cuda:0":
                assert after.reserved_bytes <= before.reserved_bytes
    assert sum(e.freed_bytes for e in flushes if e.where == "block") > 100_000_000
    (end,) = [m for m in flushes[-1].after if m.device == "cuda:0"]
    assert end.allocated_bytes < 64 << 20


@pytest.mark.parametrize(
    ("quantize", "data"),
    [
        (QuantizeConfig(), CalibrationConfig(samples=64, seq_len=512)),
        (QuantizeConfig(), CalibrationConfig(samples=128, seq_len=2048)),
        (QuantizeConfig(group_size=-1, true_sequential=False), CalibrationConfig(samples=64, seq_len=512)),
        (QuantizeConfig(solve_for="dense"), CalibrationConfig(samples=64, seq_len=512)),
    ],
)
@pytest.mark.parametrize("device_map", ["cuda:0", "model.layers.3-5=cpu,rest=0"])
def test_predicted_peak_is_within_15_percent(
    medium: Path, tmp_path: Path, quantize: QuantizeConfig, data: CalibrationConfig, device_map: str
) -> None:
    job = job_for(medium, tmp_path / "out", device_map, quantize=quantize, calibration=data)
    report = jobs.quantize(job)
    predicted, measured = dict(report.predicted_peak_bytes), dict(report.measured_peak_bytes)
    assert predicted["cuda:0"] / measured["cuda:0"] == pytest.approx(1.0, abs=0.15)


def test_replayed_forwards_need_less_and_give_the_same(
    medium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CalibrationConfig(samples=64, seq_len=1024)
    parked = jobs.quantize(job_for(medium, tmp_path / "parked", "cuda:0", calibration=data))
    judged = steps.resolve

    def replayed(*args: Any, **kwargs: Any) -> Any:
        return replace(judged(*args, **kwargs), parked=False)

    monkeypatch.setattr(steps, "resolve", replayed)
    again = jobs.quantize(job_for(medium, tmp_path / "replayed", "cuda:0", calibration=data))
    assert dict(again.measured_peak_bytes)["cuda:0"] < dict(parked.measured_peak_bytes)["cuda:0"]
    a, b = tensors(tmp_path / "parked"), tensors(tmp_path / "replayed")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_out_of_memory_is_exit_4_and_leaves_nothing(
    medium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    real = present_devices()
    roomy = tuple(DeviceBudget(b.device, 64 * GIB, 64 * GIB) if b.device == CUDA else b for b in real)
    monkeypatch.setattr(steps, "present_devices", lambda: roomy)
    torch.cuda.set_per_process_memory_fraction(0.9 * GIB / total)
    with pytest.raises(OutOfDeviceMemory) as caught:
        jobs.quantize(
            job_for(
                medium,
                tmp_path / "out",
                "cuda:0",
                calibration=CalibrationConfig(samples=128, seq_len=2048),
            )
        )
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_max_memory_makes_auto_offload_and_is_obeyed(medium: Path, tmp_path: Path) -> None:
    asked = job_for(medium, tmp_path / "plan", "auto", calibration=CalibrationConfig(samples=32, seq_len=512))
    whole = {plan.device: plan for plan in jobs.dry_run(asked).devices}["cuda:0"]
    limit = int(whole.needed_bytes / 0.95 - 0.2 * GIB)
    job = replace(asked, out=str(tmp_path / "out"), max_memory=MaxMemory(((CUDA, limit),)))
    report = jobs.quantize(job)
    assert report.devices == ("cuda:0", "cpu")
    assert dict(report.measured_peak_bytes)["cuda:0"] <= limit


def test_readings_are_the_allocators() -> None:
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    cuda, host = read_memory([CUDA, CPU])
    assert cuda.allocated_bytes >= held.numel()
    assert cuda.reserved_bytes >= cuda.allocated_bytes
    assert cuda.total_bytes == torch.cuda.get_device_properties(0).total_memory
    assert host.device == "cpu"
    (free,) = [b.free_bytes for b in present_devices() if b.device == CUDA]
    assert 0 < free <= cuda.total_bytes - held.numel()
