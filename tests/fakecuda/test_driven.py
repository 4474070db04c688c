"""Models whose own forward runs between the blocks: on several devices the checkpoint is that of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_cli.engine import block
from tests import architectures
from tests.fakecuda.runs import Quantized, different, quantize
from tests.fakecuda.test_resume import fails_until
from tests.tiny import save_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

BLOCKS = {"gemma3n_text": "model.layers", "glm_moe_dsa": "model.layers"}
"""Keys and values shared by later blocks; a second value, and experts."""
MAPS = ("rest=0", "{blocks}.1=cpu,rest=0", "{blocks}.0=1,{blocks}.1=1,rest=0", "{blocks}.1=1,rest=0")


@pytest.fixture(scope="module", params=BLOCKS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("driven") / request.param
    architectures.build(request.param).save_pretrained(path)
    save_tokenizer(path)
    return request.param, path


def test_a_map_changes_nothing(model: tuple[str, Path], text: Path, tmp_path: Path) -> None:
    name, path = model
    options = ("--recipe", "balanced", "--group-size", "16")
    reference = quantize(path, tmp_path / "cpu", text, *options, "--device-map", "cpu")
    for number, spec in enumerate(MAPS):
        device_map = spec.format(blocks=BLOCKS[name])
        run = quantize(path, tmp_path / str(number), text, *options, "--device-map", device_map)
        assert different(run, reference) == [], device_map


def test_hidden_states_on_the_host(
    model: tuple[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--group-size", "16", "--device-map", "cuda:0")
    usual = quantize(model[1], tmp_path / "usual", text, *options, "--batch-size", "1")
    at: list[str] = []
    real = block.quantize_block

    def quantize_block(context: block.BlockContext, inputs: block.BlockInputs, states: object) -> object:
        at.append(inputs.hidden[0].device.type)
        return real(context, inputs, states)  # type: ignore[arg-type]

    monkeypatch.setattr("gptq_cli.engine.loop.quantize_block", quantize_block)
    fails_until(monkeypatch, lambda moments, x: at[-1] == "cpu")
    less: Quantized = quantize(model[1], tmp_path / "less", text, *options)
    assert at[-1] == "cpu"
    assert different(less, usual) == []
