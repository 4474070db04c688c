"""The fingerprint: every setting counts but those that change neither a code nor a file."""

from __future__ import annotations

import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.calibration import TokenBatches, make_batches, open_tokenizer
from gptq_cli.checkpoint.fingerprint import FREE, Fingerprint, settings_of
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import Skeleton, open_skeleton
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from tests.e2e.commands import write_text

JOB = QuantizeJob(
    model=ModelRef(model="m"),
    out="q",
    quantize=QuantizeConfig(group_size=32),
    calibration=CalibrationConfig(samples=2, seq_len=16),
)


def names_of(value: Any, above: str = "") -> set[str]:
    """Every field of a job and of the configurations in it."""
    found = set()
    for item in fields(value):
        held = getattr(value, item.name)
        found.add(above + item.name)
        if is_dataclass(held) and not isinstance(held, DeviceMap | MaxMemory):
            found |= names_of(held, f"{above}{item.name}.")
    return found


def test_the_list_of_free_fields_names_fields() -> None:
    """A field that is renamed would count from then on without anybody having decided that."""
    assert names_of(JOB) >= FREE


def test_the_other_fields_count() -> None:
    """A new field counts from its first day. If it changes neither a code nor a file, put it into FREE."""
    counted = dict(settings_of(JOB)).keys()
    assert counted == {
        *(f"quantize.{item.name}" for item in fields(QuantizeConfig)),
        "calibration.samples",
        "calibration.seq_len",
        "model.trust_remote_code",
        "max_shard_bytes",
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def opened(tiny_llama: Path, text: Path) -> tuple[Skeleton, TokenBatches]:
    return open_job(tiny_llama, text)


def open_job(model: Path, text: Path, seed: int = 0) -> tuple[Skeleton, TokenBatches]:
    ref = ModelRef(model=str(model))
    config = CalibrationConfig.of(str(text), samples=2, seq_len=16, seed=seed)
    return open_skeleton(find_model(ref), ref), make_batches(open_tokenizer(model), config)


def names(before: Fingerprint, now: Fingerprint) -> set[str]:
    return {one.name for one in before.differences(now)}


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"quantize": QuantizeConfig(group_size=32, damp_percent=0.1)}, {"quantize.damp_percent"}),
        ({"quantize": QuantizeConfig(group_size=64)}, {"quantize.group_size", "layout"}),
        ({"max_shard_bytes": 1_000_001}, {"max_shard_bytes"}),
        ({"out": "elsewhere", "strict": True, "overwrite": True, "resume": "required"}, set()),
        ({"device_map": DeviceMap.parse("cpu"), "targets": ("vllm",), "command_line": ("gptq",)}, set()),
        ({"targets": ("vllm", "sglang"), "tp": 4}, set()),
        ({"calibration": CalibrationConfig(samples=2, seq_len=16, batch_size=1, seed=9)}, set()),
        ({"model": ModelRef(model="m", revision="v1", dtype="bfloat16")}, set()),
        ({"model": ModelRef(model="m", trust_remote_code=True)}, {"model.trust_remote_code"}),
    ],
)
def test_settings(change: dict[str, Any], differs: set[str], opened: tuple[Skeleton, TokenBatches]) -> None:
    assert names(Fingerprint.of(JOB, *opened), Fingerprint.of(replace(JOB, **change), *opened)) == differs


def test_tokens_and_files(
    tiny_llama: Path, text: Path, opened: tuple[Skeleton, TokenBatches], tmp_path: Path
) -> None:
    before = Fingerprint.of(JOB, *opened)
    copied = shutil.copytree(tiny_llama, tmp_path / "m")
    assert names(before, Fingerprint.of(JOB, *open_job(copied, text))) == set()
    assert names(before, Fingerprint.of(JOB, *open_job(copied, text, seed=5))) == {"tokens"}
    (copied / "LICENSE").write_text("free")
    path = copied / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert names(before, Fingerprint.of(JOB, *open_job(copied, text))) == {
        "file LICENSE",
        "file model.safetensors",
    }
