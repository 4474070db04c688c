"""Reports that are read back: of runs, of `load --json`, and what can be said where there is none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gptq_cli.errors import CheckpointError, ConfigError
from gptq_cli.jobs.reporting import compare, report_of
from gptq_cli.results.comparison import Comparison
from gptq_cli.results.document import document
from gptq_cli.results.load import LoadReport, VerifyReport
from gptq_cli.results.run import RunReport
from tests.display.events import report, verify_report
from tests.report.pages import full_report, measured_load


def checkpoint(folder: Path, made: RunReport | None = None) -> str:
    """A directory with what `gptq report` reads: a config, a file of weights, a report."""
    folder.mkdir()
    config = {"bits": 4, "group_size": 128, "sym": True, "desc_act": True, "damp_percent": 0.01}
    (folder / "quantize_config.json").write_text(
        json.dumps(config | {"meta": {"quantizer": ["gptqmodel:7.6"]}})
    )
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    if made is not None:
        (folder / "report.json").write_text(json.dumps(document(made)))
    return str(folder)


def test_the_report_of_a_run_is_read_from_its_directory_or_file(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "q", full_report())
    assert report_of(path) == full_report()
    assert report_of(f"{path}/report.json") == full_report()


@pytest.mark.parametrize("made", [measured_load(), verify_report(sound=False)], ids=["load", "verify"])
def test_what_load_printed_is_read_as_well(made: LoadReport | VerifyReport, tmp_path: Path) -> None:
    file = tmp_path / "proof.json"
    file.write_text(json.dumps(document(made)))
    assert report_of(str(file)) == made


def test_of_a_checkpoint_of_another_tool_its_config_is_known(tmp_path: Path) -> None:
    found = report_of(checkpoint(tmp_path / "other"))
    assert isinstance(found, Comparison)
    (run,) = found.runs
    assert (run.origin, run.size_bytes, run.loss, run.seconds) == ("config", 100, None, None)
    assert dict(run.settings) == {
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": True,
        "format": "gptq",
        "damp_percent": 0.01,
        "written by": "gptqmodel:7.6",
    }


def test_runs_are_compared_by_what_differs(tmp_path: Path) -> None:
    settings = (("bits", 3), ("group_size", 64), ("sym", True), ("damp_percent", 0.05))
    other = replace(report(), settings=settings)
    proof = tmp_path / "proof.json"
    proof.write_text(json.dumps(document(measured_load())))
    paths = [checkpoint(tmp_path / "a", full_report()), checkpoint(tmp_path / "b", other), str(proof)]
    found = compare([*paths, checkpoint(tmp_path / "c")])
    assert [run.origin for run in found.runs] == ["report.json", "report.json", "load --json", "config"]
    assert set(found.differing) == {"bits", "group_size", "desc_act", "damp_percent"}
    first, second, third, fourth = found.runs
    assert first.loss == pytest.approx(report().mean_loss)
    assert (first.kl, second.kl, third.kl, fourth.kl) == (0.0213, None, 0.0213, None)
    assert first.measured_on == "pydoc-heldout (64 x 512)"
    assert first.decode_rate == 41.2
    assert len(first.tasks) == 2
    assert [name for name, _ in first.block_losses] == [block.name for block in report().blocks]


def test_one_run_under_two_names_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a", report())
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match="is named twice"):
        compare([path, str(tmp_path / "link")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a report that can be read: Expecting property name"),
        ("[1]", "it is not a JSON object"),
        ("{}", "it is neither a report.json nor what gptq load --json prints"),
        ('{"error": {"message": "out of memory"}}', "the command that wrote it failed: out of memory"),
        ('{"schema_version": 9, "kernels": []}', "schema_version is 9; this version reads 1"),
        ('{"schema_version": 1, "kernels": []}', "path is missing"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_document_that_is_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        report_of(str(tmp_path))
    assert message in caught.value.message
    assert str(tmp_path / "report.json") in caught.value.message
    assert caught.value.hint


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        report_of(str(tmp_path / "nosuch"))
    with pytest.raises(CheckpointError, match="is not a GPTQ checkpoint"):
        report_of(str(tmp_path))
    verified = tmp_path / "v.json"
    verified.write_text(json.dumps(document(verify_report(sound=True))))
    with pytest.raises(CheckpointError, match="has no figures to compare"):
        compare([str(verified), checkpoint(tmp_path / "a")])


def test_the_report_of_a_real_run_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    from tests.e2e.commands import FAST, gptq, write_text

    text = write_text(tmp_path / "text.txt")
    for name, recipe in (("a", "fast"), ("b", "balanced")):
        words = ("--calibration", text, *FAST, "--recipe", recipe, "--device-map", "cpu")
        assert gptq("quantize", tiny_llama, "--out", tmp_path / name, *words).code == 0
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "report.json").unlink()
    page = tmp_path / "runs.html"
    found = gptq("report", tmp_path / "a", tmp_path / "b", tmp_path / "c", "--out", page, "--json")
    assert found.code == 0, found.stderr
    runs = found.document["runs"]
    assert (
        runs[0]["size_bytes"]
        == runs[2]["size_bytes"]
        == json.loads((tmp_path / "a" / "report.json").read_text())["size_after_bytes"]
    )
    assert {"sweeps", "refit", "dense_share"} <= set(found.document["differing"])
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    one = gptq("report", tmp_path / "b", "--json").document
    assert one == json.loads((tmp_path / "b" / "report.json").read_text())
    shown = gptq("report", tmp_path / "b")
    assert "mean loss" in shown.stdout
    assert shown.stderr == ""


def test_a_directory_and_its_report_are_one_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a", report())
    with pytest.raises(ConfigError, match="is named twice"):
        compare([path, f"{path}/report.json"])
