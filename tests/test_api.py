"""The two functions that the package offers to Python."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gptq_cli
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.errors import CheckpointError, ConfigError, DeviceMapError, PreflightRefused
from gptq_cli.events import Event, Observer, RunFinished
from gptq_cli.load_job import LoadJob, TaskConfig
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.results.push import PushConfig
from tests.e2e.commands import FAST, gptq, write_text


def test_load_gives_a_model_that_generates(tiny_llama: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    assert gptq("quantize", tiny_llama, "--out", tmp_path / "q", "--calibration", text, *FAST).code == 0
    model = gptq_cli.load(str(tmp_path / "q"), device_map="cpu")
    made = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)
    same = gptq_cli.load(str(tmp_path / "q"))
    assert torch.equal(same(made).logits, model(made).logits)


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        gptq_cli.load(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="dtype is 'int3'"):
        gptq_cli.load(str(tmp_path), dtype="int3")


def test_quantize_writes_what_the_command_writes(tiny_llama: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    assert gptq("quantize", tiny_llama, "--out", tmp_path / "a", "--calibration", text, *FAST).code == 0
    events: list[Event] = []
    report = gptq_cli.quantize(
        tiny_llama, out=tmp_path / "b", calibration=text, samples=8, seq_len=48, group_size=32,
        sweeps=None, observer=events.append,
    )  # fmt: skip
    assert (report.out, report.bits, report.group_size) == (str(tmp_path / "b"), 4, 32)
    assert events[-1] == RunFinished(report)
    for name in ("model.safetensors", "quantize_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_option_reaches_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[QuantizeJob] = []
    asked: list[dict[str, Any]] = []

    def quantize(job: QuantizeJob, observer: Observer, **more: Any) -> SimpleNamespace:
        jobs.append(job)
        asked.append(more)
        return SimpleNamespace(proof=None)

    pretended = SimpleNamespace(quantize=quantize)
    monkeypatch.setitem(sys.modules, "gptq_cli.jobs", pretended)
    monkeypatch.setattr(gptq_cli, "jobs", pretended, raising=False)
    limits = {"b": 0.5}
    gptq_cli.quantize(
        "M", "O", against_source=True, tasks=["a", "b"], min_scores=limits, push_to_hub="me/m", private=True
    )
    tasks = TaskConfig(names=("a", "b"), min_scores=(("b", 0.5),))
    proof = LoadJob(path="O", against="M", tasks=tasks, device_map=DeviceMap.parse("auto"))
    assert asked[0]["proof"] == proof
    assert asked[0]["push"] == PushConfig(repo_id="me/m", private=True)
    gptq_cli.quantize(
        Path("M"), Path("O"), recipe="best", bits=3, group_size="auto", sym=False, sweeps=2, calibration="c4",
        samples=7, seq_len=99, seed=5, batch_size=2, device_map={"model": 0, "lm_head": "cpu"},
        max_memory={0: "20GiB", "cpu": 1 << 35}, targets="vllm", dtype="float16", revision="main",
        trust_remote_code=True, max_shard_size=2_000_000, overwrite=True, strict=True,
    )  # fmt: skip
    assert jobs == [
        QuantizeJob(model=ModelRef(model="M"), out="O"),
        QuantizeJob(
            model=ModelRef(model="M", revision="main", trust_remote_code=True, dtype="float16"),
            out="O",
            quantize=QuantizeConfig(bits=3, sym=False, sweeps=2, dense_share=1.0, fisher_tokens=32_768),
            calibration=CalibrationConfig.of("c4", samples=7, seq_len=99, seed=5, batch_size=2),
            device_map=DeviceMap.parse("model=0,lm_head=cpu"),
            max_memory=MaxMemory.parse("0=20GiB,cpu=32GiB"),
            max_shard_bytes=2_000_000,
            overwrite=True,
            strict=True,
            targets=("vllm",),
        ),
    ]


@pytest.mark.parametrize(
    "device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), DeviceMap.parse("cpu"), '{"": "cpu"}']
)
def test_a_device_map_in_every_form(tiny_llama: Path, tmp_path: Path, device_map: object) -> None:
    with pytest.raises(PreflightRefused) as caught:
        gptq_cli.quantize(
            tiny_llama, tmp_path / "out", device_map=device_map, group_size=48, samples=2, seq_len=32
        )
    assert {finding.rule for finding in caught.value.report.findings if finding.level == "error"} == {
        "group-divides"
    }


def test_a_refusal_as_text_lists_every_finding_with_its_hint(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(PreflightRefused) as caught:
        gptq_cli.quantize(tiny_llama, tmp_path / "out", group_size=48, samples=4, seq_len=32)
    first, *rest = str(caught.value).splitlines()
    assert first == "refused by preflight: 2 errors"
    findings = caught.value.report.ordered()
    assert len([finding for finding in findings if finding.level == "error"]) == 2
    for finding in findings:
        line = next(line for line in rest if f"[{finding.rule}]" in line and finding.message in line)
        assert line.startswith(finding.level)
        assert not finding.hint or rest[rest.index(line) + 1] == f"  hint: {finding.hint}"


def test_disk_is_the_value_error_that_users_know(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^disk offload is not supported with GPTQ quantization$") as caught:
        gptq_cli.quantize(tiny_llama, tmp_path / "out", device_map={"": "disk"}, group_size=32, samples=2)
    assert isinstance(caught.value, PreflightRefused)
    lines = caught.value.report.lines
    place = next(number for number, line in enumerate(lines) if line.startswith("error [disk-offload] "))
    assert lines[place + 1].startswith("  hint: --device-map ")


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"bits": 5}, ConfigError, "bits is 5; allowed: 2, 3, 4, 8"),
        ({"recipe": "bset"}, ConfigError, "recipe is 'bset'; allowed: fast"),
        ({"targets": "vlm"}, ConfigError, "target is 'vlm'"),
        ({"max_shard_size": "huge"}, ConfigError, "max_shard_size: 'huge'"),
        ({"device_map": "cuda:-1"}, DeviceMapError, "device map"),
        ({"max_memory": 3}, DeviceMapError, "max memory"),
        ({"calibration": ""}, ConfigError, "calibration is empty"),
        ({"bit": 4}, TypeError, "unexpected keyword argument 'bit'; did you mean bits?"),
        ({"source": "c4"}, TypeError, "unexpected keyword argument 'source'"),
    ],
)
def test_errors_are_those_of_the_command_line(wrong: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        gptq_cli.quantize("M", "O", **wrong)


def test_warnings_are_logged(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = write_text(tmp_path / "text.txt")
    report = gptq_cli.quantize(
        tiny_llama, tmp_path / "q", calibration=text, samples=2, seq_len=48, group_size=32, recipe="fast"
    )
    assert report.warnings
    assert [record.getMessage() for record in caplog.records if record.name == "gptq_cli"] == list(
        report.warnings
    )
    assert {record.levelname for record in caplog.records if record.name == "gptq_cli"} == {"WARNING"}


def test_load_hands_over_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LoadJob] = []
    pretended = SimpleNamespace(open_model=lambda job, observer: asked.append(job))
    monkeypatch.setitem(sys.modules, "gptq_cli.jobs", pretended)
    monkeypatch.setattr(gptq_cli, "jobs", pretended, raising=False)
    gptq_cli.load(Path("Q"))
    gptq_cli.load("Q", {"": "cpu"}, "float16", trust_remote_code=True)
    given = DeviceMap.parse({"": "cpu"})
    trusted = LoadJob(path="Q", device_map=given, dtype="float16", trust_remote_code=True)
    assert asked == [LoadJob(path="Q"), trusted]


def test_the_documentation_names_every_parameter() -> None:
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    for name in signature(gptq_cli.load).parameters:
        assert re.search(rf"^## `gptq_cli\.load\(.*\b{name}\b", page, re.MULTILINE)
    table = set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE))
    names = {name for name in signature(gptq_cli.quantize).parameters if name != "options"}
    names |= {field.name for field in fields(QuantizeConfig)}
    names |= {field.metadata.get("name", field.name) for field in fields(CalibrationConfig)}
    assert table == names
