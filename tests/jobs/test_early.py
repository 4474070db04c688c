"""What is refused before torch is imported: the same rules as later, all at once, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.errors import CheckpointError, ModelError, PreflightRefused
from gptq_cli.events import Event, FindingRaised
from gptq_cli.jobs.early import before_load, before_push, before_quantize
from gptq_cli.jobs.reporting import compare, report_of
from gptq_cli.load_job import LoadJob
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.find import glance_at_model
from gptq_cli.model.source import ModelFiles
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.preflight.early import early_findings, input_columns
from gptq_cli.results.push import PushConfig
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 64, inner width 128."""
    return save_tiny("llama", tmp_path_factory.mktemp("early") / "model")


def job_of(model: Path | str, out: Path, **codes: object) -> QuantizeJob:
    return QuantizeJob(
        model=ModelRef(model=str(model)),
        out=str(out),
        quantize=QuantizeConfig.of("balanced", **codes),
        calibration=CalibrationConfig(samples=2, seq_len=16),
        device_map=DeviceMap.parse("cpu"),
    )


def refused_rules(job: QuantizeJob, push: PushConfig | None = None) -> list[str]:
    events: list[Event] = []
    with pytest.raises(PreflightRefused) as refused:
        before_quantize(job, events.append, push)
    found = [finding.rule for finding in refused.value.report.findings]
    assert [event.finding.rule for event in events if isinstance(event, FindingRaised)] == found
    return found


def test_every_cheap_error_is_reported_at_once(model: Path, tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    assert refused_rules(job_of(model, tmp_path, bits=2, group_size=48)) == ["output-exists", "group-divides"]
    assert refused_rules(job_of(model, model, group_size=128)) == ["output-is-model", "group-too-large"]


def test_settings_that_would_be_copied_broken_into_the_checkpoint(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    (source / "generation_config.json").write_text('{"top_p": ')
    assert refused_rules(job_of(source, tmp_path / "out")) == ["broken-settings"]


def test_an_upload_that_cannot_be_is_one_of_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    job = job_of(model, tmp_path / "out", group_size=48)
    assert refused_rules(job, PushConfig(repo_id="me/model")) == ["push-offline", "group-divides"]
    assert refused_rules(replace(job, quantize=QuantizeConfig()), PushConfig(repo_id="a b")) == ["push-id"]


def test_disk_and_a_short_text_are_named_beside_other_errors(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("little")
    job = job_of(model, tmp_path / "out", group_size=48)
    job = replace(
        job,
        device_map=DeviceMap.parse("model.layers.0=disk,rest=cpu"),
        calibration=CalibrationConfig.of(str(text), samples=8, seq_len=48),
    )
    assert set(refused_rules(job)) == {"group-divides", "disk-offload", "calibration-text"}
    before_quantize(replace(job, quantize=QuantizeConfig()), lambda _: None)


@pytest.mark.parametrize("source", ["/nosuch.txt", ".", "FILE:column"])
def test_a_text_that_is_no_source(model: Path, tmp_path: Path, source: str) -> None:
    text = tmp_path / "long.txt"
    text.write_text("word " * 1000)
    job = job_of(model, tmp_path / "out")
    data = CalibrationConfig.of(source.replace("FILE", str(text)), samples=2, seq_len=16)
    assert refused_rules(replace(job, calibration=data)) == ["calibration-text"]


def test_every_text_that_is_no_source_is_named(model: Path, tmp_path: Path) -> None:
    data = CalibrationConfig.of(["/nosuch.txt", "pydoc", "/nosuch.jsonl*2"], samples=3, seq_len=16)
    job = replace(job_of(model, tmp_path / "out"), calibration=data)
    report = early_findings(job, glance_at_model(job.model), None)
    assert [finding.subject for finding in report.findings] == ["/nosuch.txt", "/nosuch.jsonl"]


@pytest.mark.parametrize("group", [48, 128, 96])
def test_the_complete_preflight_finds_the_same(model: Path, tmp_path: Path, group: int) -> None:
    from gptq_cli.jobs.checking import check

    job = job_of(model, tmp_path / "out", group_size=group)
    early = refused_rules(job)
    late = {f.rule: f for f in check(job, lambda _: None).findings.findings if f.level == "error"}
    assert set(early) <= set(late)
    assert late[early[0]].subject == f"--group-size {group}"


def test_what_fits_is_not_refused(model: Path, tmp_path: Path) -> None:
    before_quantize(job_of(model, tmp_path / "out", group_size=32), lambda _: None)
    before_quantize(job_of(model, tmp_path / "out", group_size="auto", bits=8), lambda _: None)
    rules = {"group_size": 128, "modules": ("*.down_proj=group:64", "*=dense")}
    before_quantize(job_of(model, tmp_path / "out", **rules), lambda _: None)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "mixtral", "qwen3_moe"])
def test_other_layouts_are_not_refused_for_what_fits(name: str, tmp_path: Path) -> None:
    path = save_tiny(name, tmp_path / "model")
    assert early_findings(
        job_of(path, tmp_path / "out", group_size=8), glance_at_model(ModelRef(model=str(path))), None
    ).ok


def test_widths_are_those_of_the_part_whose_blocks_hold_most(tmp_path: Path) -> None:
    config = {
        "vision_config": {"hidden_size": 40},
        "text_config": {"hidden_size": 96, "intermediate_size": 160},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def matrix(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, shape, "float32", 0, "model.safetensors")

    files = ModelFiles(
        directory=tmp_path,
        source="m",
        tensors=(
            matrix("vision.layers.0.q.weight", 40, 40),
            matrix("text.layers.0.q.weight", 64, 96),
            matrix("text.layers.0.up.weight", 160, 96),
            matrix("text.layers.0.down.weight", 96, 160),
            matrix("embed.weight", 1000, 96),
        ),
    )
    assert input_columns(files) == {"hidden_size": 96, "intermediate_size": 160}
    assert input_columns(replace(files, tensors=files.tensors[:1])) == {"hidden_size": 40}
    assert input_columns(replace(files, tensors=files.tensors[-1:])) == {}


def configured(model: Path, place: Path, **fields: object) -> Path:
    """A copy of the model with these fields in its config.json; None takes a field out."""
    copy = shutil.copytree(model, place)
    config = json.loads((copy / "config.json").read_text()) | fields
    named = {key: value for key, value in config.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(named))
    return copy


BITNET = {"quant_method": "bitnet", "quantization_mode": "online"}


@pytest.mark.parametrize("name", ["", "model.layers.0.self_attn.q_proj.qweight"])
def test_what_is_quantized_already_is_refused_early_and_in_the_same_words(
    name: str, model: Path, tmp_path: Path
) -> None:
    """By its config, or by its tensors under a config that says nothing (AutoGPTQ)."""
    from gptq_cli.jobs.checking import check

    source = configured(model, tmp_path / "model", quantization_config=None if name else BITNET)
    if name:
        tensors = load_file(source / "model.safetensors")
        tensors[name] = torch.zeros(8, 64, dtype=torch.int32)
        save_file(tensors, source / "model.safetensors")
    job = job_of(source, tmp_path / "out")
    (early,) = early_findings(job, glance_at_model(job.model), None).findings
    late = [f for f in check(job, lambda _: None).findings.findings if f.level == "error"]
    assert (early.rule, [early]) == ("already-quantized", late)


def test_a_config_that_was_left_behind_is_not_refused(model: Path, tmp_path: Path) -> None:
    """Dense tensors; and what has yet to be fetched may be dense."""
    source = configured(model, tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    job = job_of(source, tmp_path / "out")
    files = glance_at_model(job.model)
    assert early_findings(job, files, None).ok
    assert early_findings(job, replace(files, tensors=(), problems=()), None).ok
    (source / "config.json").write_text("[]")
    assert early_findings(job, files, None).ok  # opening the model says what is wrong


@pytest.mark.parametrize(
    ("fields", "early"),
    [
        ({}, True),
        ({"max_position_embeddings": None}, False),  # that of the class
        ({"max_position_embeddings": "many"}, False),
        ({"text_config": {"max_position_embeddings": 48}}, True),
        ({"text_config": {}}, False),
    ],
)
def test_windows_longer_than_the_positions_in_the_config(
    fields: dict[str, object], early: bool, model: Path, tmp_path: Path
) -> None:
    source = configured(model, tmp_path / "model", **fields)
    job = replace(job_of(source, tmp_path / "out"), calibration=CalibrationConfig(samples=2, seq_len=100_000))
    found = early_findings(job, glance_at_model(job.model), None).findings
    assert [finding.rule for finding in found] == (["seq-len-positions"] if early else [])
    named = 48 if "text_config" in fields else 512
    assert not found or found[0].hint == f"--seq-len {named}"


def test_windows_are_refused_in_the_same_words_early(model: Path, tmp_path: Path) -> None:
    from gptq_cli.jobs.checking import check

    job = replace(job_of(model, tmp_path / "out"), calibration=CalibrationConfig(samples=1, seq_len=600))
    assert refused_rules(job) == ["seq-len-positions"]
    report = early_findings(job, glance_at_model(job.model), None)
    late = [f for f in check(job, lambda _: None).findings.findings if f.level == "error"]
    assert list(report.findings) == late


def test_windows_and_disk_are_told_together_with_the_map_that_avoids_it(model: Path, tmp_path: Path) -> None:
    from gptq_cli.jobs.checking import check

    job = replace(
        job_of(model, tmp_path / "out"),
        calibration=CalibrationConfig(samples=1, seq_len=600),
        device_map=DeviceMap.parse("model.layers.1=disk,rest=cpu"),
    )
    assert early_findings(job, glance_at_model(job.model), None).ok
    findings = check(job, lambda _: None).findings.findings
    assert {"disk-offload": "--device-map", "seq-len-positions": "--seq-len"}.items() <= {
        f.rule: str(f.hint).split()[0] for f in findings if f.level == "error"
    }.items()


def test_what_an_ended_run_left_is_the_jobs_to_put_in_order(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "d").mkdir(parents=True)
    assert refused_rules(job_of(model, out)) == ["output-exists"]
    from gptq_cli.checkpoint.place import Place
    from gptq_cli.checkpoint.working_folder import WorkingFolder

    place = Place.of(out)
    folder = WorkingFolder(place.folder, place.out)
    folder.claim()
    try:
        before_quantize(job_of(model, out), lambda _: None)
    finally:
        folder.clear()


def test_models_and_checkpoints_that_are_not_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        before_quantize(job_of(tmp_path / "nosuch", tmp_path / "out"), lambda _: None)
    for verify in (False, True):
        with pytest.raises(CheckpointError, match="no such directory"):
            before_load(LoadJob(path=str(tmp_path / "nosuch"), verify=verify))
    with pytest.raises(CheckpointError, match="is not a GPTQ checkpoint"):
        before_load(LoadJob(path=str(model)))
    before_load(LoadJob(path=str(model), verify=True))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["load", "/nosuch"], 2),
        (["load", "/nosuch", "--verify"], 2),
        (["inspect-map", "/nosuch"], 2),
        (["quantize", "/nosuch", "--out", "OUT"], 2),
        (["quantize", "MODEL", "--out", "OUT", "--group-size", "48"], 3),
        (["quantize", "MODEL", "--out", "MODEL"], 3),
        (["quantize", "MODEL", "--out", "OUT", "--seq-len", "513"], 3),
        (["quantize", "QUANTIZED", "--out", "OUT"], 3),
    ],
)
def test_torch_is_not_imported_for_it(model: Path, tmp_path: Path, words: list[str], code: int) -> None:
    quantized = configured(model, tmp_path / "quantized", quantization_config=BITNET)
    places = {"MODEL": str(model), "QUANTIZED": str(quantized), "OUT": str(tmp_path / "out")}
    argv = [places.get(word, word) for word in words]
    program = (
        "import sys\nfrom gptq_cli.cli.app import main\n"
        f"assert main({argv!r}) == {code}\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "startup: started" in done.stderr
    assert "error" in done.stderr


def test_a_lack_of_memory_is_told_as_in_the_job(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptq_cli import jobs
    from gptq_cli.errors import OutOfDeviceMemory

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("gptq_cli.model.source.read_header", full)
    with pytest.raises(OutOfDeviceMemory, match="while opening the model"):
        jobs.quantize(job_of(model, tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "built", "said"),
    [
        (
            {"device_map": DeviceMap.parse("cuda:0")},
            "2.13.0+cpu",
            "torch 2.13.0+cpu is built for the cpu alone",
        ),
        ({"device_map": DeviceMap.parse("model.layers=xpu:1,rest=cpu")}, "2.11.0+cpu", "xpu:1 is not on"),
        ({"max_memory": MaxMemory.parse("0=20GiB,cpu=4GiB")}, "2.13.0+cpu", "cuda:0 is not on"),
        ({"device_map": DeviceMap.parse("mps")}, "2.13.0", "mps is of Apple's computers"),
    ],
)
def test_a_device_that_cannot_be_there(
    options: dict[str, Any],
    built: str,
    said: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("gptq_cli.preflight.early.version", lambda name: built)
    job = replace(job_of(model, tmp_path / "out"), **options)
    report = early_findings(job, glance_at_model(job.model), None)
    (finding,) = report.findings
    assert (finding.rule, finding.level) == ("device-absent", "error")
    assert said in finding.message


@pytest.mark.parametrize("built", ["2.13.0", "2.13.0+cu130", "2.13.0+rocm7.0"])
def test_a_device_that_may_be_there_is_left_to_torch(
    built: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr("gptq_cli.preflight.early.version", lambda name: built)
    job = replace(job_of(model, tmp_path / "out"), device_map=DeviceMap.parse("cuda:0"))
    assert early_findings(job, glance_at_model(job.model), None).ok


def test_an_empty_path_is_not_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gptq push "$DIR" ID` in a script that did not set DIR."""
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    monkeypatch.chdir(tmp_path)
    for ask in (
        lambda: before_push("", PushConfig(repo_id="me/model"), lambda _: None),
        lambda: before_load(LoadJob(path="")),
        lambda: report_of(""),
        lambda: compare(["", "other"]),
    ):
        with pytest.raises(CheckpointError, match="the path is empty; allowed: a directory"):
            ask()


def test_nothing_is_uploaded_where_nothing_is() -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        before_push("nosuch", PushConfig(repo_id="me/model"), lambda _: None)


def test_an_upload_is_refused_before_torch_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    events: list[Event] = []
    with pytest.raises(PreflightRefused) as refused:
        before_push(str(tmp_path), PushConfig(repo_id="me/model"), events.append)
    assert [finding.rule for finding in refused.value.report.findings] == ["push-offline"]
    assert len(events) == 1
