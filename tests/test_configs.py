"""Every preset, shipped or example, is taken by `gptq quantize --config` and means what its comment says."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.main

from gptq_cli.cli.app import app
from gptq_cli.cli.preset import options_of, read_preset, shipped_presets
from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.placement.device_map import DeviceMap, MaxMemory

EXAMPLES = Path(__file__).parent.parent / "configs"
PRESETS = [*shipped_presets().values(), *sorted(EXAMPLES.glob("*.toml"))]


def _values(path: Path) -> dict[str, object]:
    group = typer.main.get_command(app)
    return read_preset(path, options_of(group.commands["quantize"])).values  # type: ignore[attr-defined]


def test_there_are_presets() -> None:
    assert {"w4g128", "w8", "two-gpus"} <= {path.stem for path in PRESETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_makes_a_configuration(path: Path) -> None:
    values = _values(path)
    recipe = {key: held for key, held in values.items() if key in QuantizeConfig.__dataclass_fields__}
    text = {key: held for key, held in values.items() if key in CalibrationConfig.__dataclass_fields__}
    config = QuantizeConfig(**recipe)  # type: ignore[arg-type]
    calibration = CalibrationConfig(**text)  # type: ignore[arg-type]
    rest = set(values) - set(recipe) - set(text) - {"calibration", "device_map", "max_memory"}
    assert not rest
    assert 32_768 <= calibration.samples * calibration.seq_len <= 128 * 2048  # what pydoc is sure to hold
    assert f"{config.bits} bits, group {config.group_size}" in path.read_text()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_names_itself_in_the_command_of_its_comment(path: Path) -> None:
    spelled = f"configs/{path.name}" if path.parent == EXAMPLES else path.stem
    assert f"--config {spelled} " in path.read_text()


def test_the_standard_preset_is_the_default() -> None:
    values = _values(shipped_presets()["w4g128"])
    default = QuantizeConfig()
    wide = default.for_columns([4096, 14336])
    assert [values[key] for key in ("bits", "group_size", "sym", "desc_act")] == [
        wide.bits, wide.group_size, wide.sym, wide.desc_act
    ]  # fmt: skip
    text = CalibrationConfig()
    assert (values["calibration"], values["samples"], values["seq_len"]) == (
        [text.words],
        text.samples,
        text.seq_len,
    )


def test_two_gpus_splits_after_block_15() -> None:
    values = _values(EXAMPLES / "two-gpus.toml")
    device_map = DeviceMap.parse(values["device_map"])  # type: ignore[arg-type]
    devices = {
        name: str(rule.device)
        for name in ("model.embed_tokens", "model.layers.0", "model.layers.15", "model.layers.16", "lm_head")
        for rule in device_map.rules
        if rule.covers(name) and rule.pattern
    }
    assert devices == dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.15"), "cuda:0")
    assert [str(rule.device) for rule in device_map.rules if not rule.pattern] == ["cuda:1"]
    assert len(str(MaxMemory.parse(values["max_memory"])).split(",")) == 2  # type: ignore[arg-type]
