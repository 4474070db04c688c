"""Measured in the same command: figures in every place, limits that decide the exit code, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptq_cli.checkpoint.amend import amend
from gptq_cli.errors import CheckpointError, GptqError, OutOfDeviceMemory
from gptq_cli.jobs import proof
from tests.e2e.commands import FAST, gptq, write_text


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def test_a_checkpoint_measured_and_gated(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "q", tmp_path / "run.html"
    words = ("--calibration", text, *FAST, "--eval", text, "--against-source", "--report", page, "--json")
    made = gptq("quantize", tiny_llama, "--out", out, *words, "--max-kl", "1e-9", "--device-map", "cpu")
    assert made.code == 5
    assert "above --max-kl" in made.stderr
    assert "stays" in made.stderr
    figures = made.document["proof"]
    assert (figures["against"], figures["ok"]) == (str(tiny_llama), False)
    assert json.loads((out / "report.json").read_text())["proof"] == figures
    assert f"| perplexity | {figures['perplexity']:.3f} |" in (out / "README.md").read_text(encoding="utf-8")
    assert "KL(dense, quantized)" in page.read_text(encoding="utf-8")
    windows = ("--eval", text, "--against", tiny_llama, "--device-map", "cpu", "--json", "--progress", "none")
    loaded = gptq("load", out, *windows)
    assert loaded.document["agreement"] == figures["agreement"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_text_that_is_not_there_is_refused_before_the_work(
    tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    words = ("--calibration", text, *FAST, "--eval", tmp_path / "nosuch.txt", "--json")
    for dry in ((), ("--dry-run",)):
        made = gptq("quantize", tiny_llama, "--out", tmp_path / "q", *words, *dry)
        assert made.code == 3
        found = made.document["findings"] if dry else made.document["error"]["findings"]
        assert [item["rule"] for item in found if item["level"] == "error"] == ["evaluation-text"]
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("kind", "code"), [(OutOfDeviceMemory, 4), (CheckpointError, 5)])
def test_what_cannot_be_measured_leaves_the_checkpoint(
    kind: type[GptqError],
    code: int,
    tiny_llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object) -> None:
        raise kind("the reason")

    monkeypatch.setattr(proof, "load", failing)
    out = tmp_path / "q"
    made = gptq("quantize", tiny_llama, "--out", out, "--calibration", text, *FAST, "--eval", text)
    assert made.code == code
    said = " ".join(made.stderr.split())
    assert f"the checkpoint {out} is complete, but it could not be measured: the reason" in said
    assert f"gptq load {out} --eval {text}" in said
    assert json.loads((out / "report.json").read_text())["proof"] is None


def test_an_interrupted_measurement_says_that_the_checkpoint_is_complete(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "load", stopped)
    words = ("--calibration", text, *FAST, "--eval", text)
    made = gptq("quantize", tiny_llama, "--out", tmp_path / "q", *words, interrupted=True)
    assert made.code == 130
    assert "is complete" in made.stderr
    assert (tmp_path / "q" / "config.json").is_file()


def test_amending_replaces_whole_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    amend(tmp_path, {"a": "new", "b": "x"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "x"}
    with pytest.raises(OSError, match="directory"):
        amend(tmp_path / "nowhere", {"a": "new"})
