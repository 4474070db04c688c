"""Placement obeyed, offload that changes nothing, memory as predicted: on a card, and on a make-believe one.

What only a card can show (contexts, workspaces, fragmentation, hundreds of megabytes) is marked `card`.
"""

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
from gptq_cli.devices.accelerators import current_accelerator, present_devices, read_memory
from gptq_cli.devices.offload import replace_dispatch_hooks
from gptq_cli.errors import OutOfDeviceMemory
from gptq_cli.events import BlockStarted, CacheFlushed, Event
from gptq_cli.jobs import steps
from gptq_cli.model.describe import model_facts
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.model.weights import load_resident
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.preflight.resolve import resolve
from tests.e2e.commands import write_text
from tests.gpu.limits import largest_limit
from tests.gpu.models import SMALL, save_random

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
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("text") / "text.txt", words=60_000))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("small") / "model", **SMALL)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("medium") / "model")


def job_for(model: Path, out: Path, device_map: str, text: str = "", **changed: Any) -> QuantizeJob:
    made = QuantizeJob(
        model=ModelRef(model=str(model)),
        out=str(out),
        quantize=QuantizeConfig(group_size=32),
        calibration=CalibrationConfig(samples=8, seq_len=64),
        device_map=DeviceMap.parse(device_map),
    )
    made = replace(made, **changed)
    sources = CalibrationConfig.of(text).sources if text else made.calibration.sources
    return replace(made, calibration=replace(made.calibration, sources=sources))


def size_bytes(model: Path) -> int:
    return sum(shard.stat().st_size for shard in model.glob("*.safetensors"))


def tensors(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(out.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def test_everything_runs_on_one_device(tiny: Tiny, text: str, tmp_path: Path) -> None:
    events: list[Event] = []
    report = jobs.quantize(job_for(tiny("llama"), tmp_path / "out", "cuda:0", text), events.append)
    assert report.devices == ("cuda:0",)
    assert {e.device for e in events if isinstance(e, BlockStarted)} == {"cuda:0"}
    assert report.fallbacks == 0
    assert tensors(tmp_path / "out")
    assert dict(report.measured_peak_bytes)["cuda:0"] > 0


def test_auto_chooses_the_current_accelerator(tiny: Tiny, text: str, tmp_path: Path) -> None:
    assert current_accelerator() == CUDA
    report = jobs.quantize(job_for(tiny("llama"), tmp_path / "out", "auto", text))
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
    tiny: Tiny, text: str, tmp_path: Path, device_map: str, dtype: torch.dtype
) -> None:
    model = tiny("llama", dtype=dtype)
    jobs.quantize(job_for(model, tmp_path / "whole", "cuda:0", text))
    events: list[Event] = []
    report = jobs.quantize(job_for(model, tmp_path / "offloaded", device_map, text), events.append)
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
        chain.return_to_cpu()
        homes = {p.device.type for name in chain.hooked for p in model.get_submodule(name).parameters()}
        assert homes == {"cpu"}
    for name in placement.offloaded:
        module = model.get_submodule(name)
        assert all(t.device.type == "cpu" for t in (*module.parameters(), *module.buffers()))
        assert not any(hasattr(part, "_hf_hook") for part in module.modules())


def test_flushes_give_reserved_memory_back(small: Path, text: str, tmp_path: Path) -> None:
    """What the blocks leave in the cache is a multiple of the model; in the end nothing is left."""
    events: list[Event] = []
    asked = CalibrationConfig(samples=16, seq_len=256)
    jobs.quantize(job_for(small, tmp_path / "out", "cuda:0", text, calibration=asked), events.append)
    flushes = [e for e in events if isinstance(e, CacheFlushed)]
    assert [e.where for e in flushes] == ["capture", *["block"] * SMALL["num_hidden_layers"], "end"]
    for flush in flushes:
        for before, after in zip(flush.before, flush.after, strict=True):
            if before.device == "cuda:0":
                assert after.reserved_bytes <= before.reserved_bytes
    size = size_bytes(small)
    assert sum(e.freed_bytes for e in flushes if e.where == "block") > 2 * size
    (end,) = [m for m in flushes[-1].after if m.device == "cuda:0"]
    assert end.allocated_bytes == 0


@pytest.mark.card
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
    small: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CalibrationConfig(samples=24, seq_len=256, batch_size=2)
    parked = jobs.quantize(job_for(small, tmp_path / "parked", "cuda:0", text, calibration=data))
    resolve = steps.resolve

    def replayed(*args: Any, **kwargs: Any) -> Any:
        made = resolve(*args, **kwargs)
        blocks = tuple(replace(block, replayed="memory") for block in made.schedule.blocks)
        return replace(made, schedule=replace(made.schedule, blocks=blocks))

    monkeypatch.setattr(steps, "resolve", replayed)
    again = jobs.quantize(job_for(small, tmp_path / "replayed", "cuda:0", text, calibration=data))
    assert dict(again.measured_peak_bytes)["cuda:0"] < dict(parked.measured_peak_bytes)["cuda:0"]
    a, b = tensors(tmp_path / "parked"), tensors(tmp_path / "replayed")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_out_of_memory_is_exit_4_and_leaves_nothing(
    small: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device gives less than one block and the work on it take; the plan believes in more."""
    data = CalibrationConfig(samples=64, seq_len=512)
    job = job_for(small, tmp_path / "out", "cuda:0", text, calibration=data)
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 0.3 * size_bytes(small)) / total)
    with pytest.raises(OutOfDeviceMemory) as caught:
        jobs.quantize(job)
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_max_memory_is_obeyed_by_what_is_measured(small: Path, text: str, tmp_path: Path) -> None:
    job = job_for(
        small, tmp_path / "out", "auto", text, calibration=CalibrationConfig(samples=16, seq_len=256)
    )
    given = largest_limit(small, "auto", (CUDA,), 1, job.calibration, job.quantize)
    report = jobs.quantize(replace(job, max_memory=given))
    assert report.devices == ("cuda:0",)
    assert dict(report.measured_peak_bytes)["cuda:0"] <= (given.get(CUDA) or 0)


def test_readings_are_the_allocators() -> None:
    held = torch.empty(4 << 20, dtype=torch.uint8, device="cuda")
    cuda, host = read_memory([CUDA, CPU])
    assert cuda.allocated_bytes >= held.numel()
    assert cuda.reserved_bytes >= cuda.allocated_bytes
    assert cuda.total_bytes == torch.cuda.get_device_properties(0).total_memory
    assert host.device == "cpu"
    (free,) = [b.free_bytes for b in present_devices() if b.device == CUDA]
    assert 0 < free <= cuda.total_bytes - held.numel()
