"""Going on with less memory, and on other devices: what was finished stays, what is left is done there."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_cli.engine import block
from gptq_cli.engine.driven import Driven
from gptq_cli.jobs import keeping, snapshot_time
from tests.architectures import build
from tests.e2e.commands import gptq
from tests.fakecuda.devices import Devices
from tests.fakecuda.runs import different, quantize, words_for
from tests.tiny import save_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

Tiny = Callable[..., Path]


def fails_until(monkeypatch: pytest.MonkeyPatch, fits: Callable[[Any, Any], bool]) -> None:
    """The device has no room for a micro-batch's moment until `fits(moments, x)`."""
    real = block.StageMoments.add

    def add(moments: Any, x: Any, *words: Any) -> None:
        if not fits(moments, x):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        real(moments, x, *words)

    monkeypatch.setattr(block.StageMoments, "add", add)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_every_step_to_less_memory(
    name: str, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the hidden states rest on the host: then the result is that of a run of such micro-batches."""
    options = ("--device-map", "cuda:0", "--recipe", "balanced")
    usual = quantize(tiny(name), tmp_path / "usual", text, *options, "--batch-size", "1")
    homes: list[str] = []
    real = block.quantize_block

    def quantize_block(context: Any, calls: Any, captured: Any) -> Any:
        homes.append(captured.hidden[0].device.type)
        return real(context, calls, captured)

    monkeypatch.setattr("gptq_cli.engine.loop.quantize_block", quantize_block)
    fails_until(monkeypatch, lambda moments, x: homes[-1] == "cpu")
    less = quantize(tiny(name), tmp_path / "less", text, *options)
    steps = [warning for warning in less.report["warnings"] if "tried again" in warning]
    said = ["of 2 instead of 8", "of 1 instead of 2", "run again for each stage", "memory of the host"]
    if name == "qwen3_moe":
        said = [words for words in said if words in "".join(steps)]
    assert len(steps) == len(said)
    assert all(words in step for words, step in zip(said, steps, strict=True)), steps
    assert homes[-1] == "cpu"
    assert different(less, usual) == []


def test_hidden_states_on_the_host_inside_open_forwards(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own code between the blocks gets back what it gave, on the device that it works on."""
    model = tmp_path / "model"
    build("gemma3n_text").save_pretrained(model)
    save_tokenizer(model)
    options = ("--device-map", "cuda:0", "--recipe", "balanced")
    usual = quantize(model, tmp_path / "usual", text, *options, "--batch-size", "1")
    rested: list[str] = []
    real = block.quantize_block

    def quantize_block(context: Any, inputs: Any, states: Any) -> Any:
        assert isinstance(states, Driven)
        rested.append(inputs.hidden[0].device.type)
        return real(context, inputs, states)

    monkeypatch.setattr("gptq_cli.engine.loop.quantize_block", quantize_block)
    fails_until(monkeypatch, lambda moments, x: rested[-1] == "cpu")
    less = quantize(model, tmp_path / "less", text, *options)
    assert rested[-4:] == ["cpu"] * 4
    assert different(less, usual) == []


def test_when_nothing_helps_the_device_is_left_free(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_until(monkeypatch, lambda moments, x: False)
    gc.disable()  # what lies in cycles is not to be found by luck
    try:
        ran = gptq(*words_for(tiny("llama"), tmp_path / "out", text, "--device-map", "cuda:0"))
        left = torch.cuda.memory_allocated(0)
    finally:
        gc.enable()
    assert ran.code == 4
    assert ran.stderr.count("tried again with") == 4
    assert left == 0


def test_a_run_goes_on_on_another_device(
    devices: Devices, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_time, "SNAPSHOT_SHARE", 1e9)
    whole = quantize(tiny("llama"), tmp_path / "whole", text, "--device-map", "cpu")
    real = keeping.Keeping.keep

    def keep(keeper: Any, report: Any, captured: Any) -> None:
        real(keeper, report, captured)
        raise RuntimeError("stopped")

    for share, after in ((1e9, "cuda:0"), (0.0, "model.layers.1=1,model.layers.2=cpu,rest=0")):
        monkeypatch.setattr(snapshot_time, "SNAPSHOT_SHARE", share)
        out = tmp_path / after[:6]
        with monkeypatch.context() as patch:
            patch.setattr(keeping.Keeping, "keep", keep)
            assert gptq(*words_for(tiny("llama"), out, text, "--device-map", "cpu")).code == 1
        gone_on = quantize(tiny("llama"), out, text, "--device-map", after, "--resume", "required")
        assert [start["first_block"] for start in gone_on.report["starts"]] == [0, 1]
        assert different(gone_on, whole) == []
