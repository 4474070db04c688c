"""`--config report.json` runs a run again: the second checkpoint has the bytes of the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gptq_cli
from tests.documents import checked_document
from tests.e2e.commands import gptq, write_text

SIZES = ("--samples", "8", "--seq-len", "48", "--group-size", "32", "--max-shard-size", "1MB")
RECIPE = ("--recipe", "best", "--seed", "3", "--desc-act", "--quantize-head", "--device-map", "cpu")
MODULES = ("--module", "model.layers.0=bits:8", "--module", "*.layers.1.mlp=dense")
MEASURED = ("--max-kl", "9", "--against-source")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def settings(path: Path) -> dict[str, Any]:
    report = checked_document((path / "report.json").read_text(encoding="utf-8"), "run_report")
    found: dict[str, Any] = report["settings"]
    return found


def files(path: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but its report, which holds times."""
    return {one.name: one.read_bytes() for one in path.iterdir() if one.name != "report.json"}


def test_a_run_again_writes_the_same_bytes(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    words = (
        *SIZES,
        *RECIPE,
        *MODULES,
        *MEASURED,
        "--eval",
        text,
        "--calibration",
        f"{text}*3",
        "--calibration",
        "pydoc",
    )
    quiet = ("--progress", "none")
    done = gptq("quantize", tiny_llama, "--out", first, *words, *quiet)
    assert done.code == 0, done.stderr
    again = gptq("quantize", "--config", first / "report.json", "--out", second, *quiet)
    assert again.code == 0, again.stderr
    assert files(first) == files(second)
    assert settings(second) == settings(first) | {"out": str(second)}
    proof = json.loads((second / "report.json").read_text(encoding="utf-8"))["proof"]
    assert [gate["name"] for gate in proof["gates"]] == ["max_kl"]


def test_a_run_from_python_can_be_run_again_and_changed(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    options = {"calibration": str(text), "samples": 8, "seq_len": 48, "recipe": "fast", "card": "none"}
    gptq_cli.quantize(str(tiny_llama), out=str(tmp_path / "first"), **options)
    report = tmp_path / "first" / "report.json"
    again = gptq("quantize", "--config", report, "--out", tmp_path / "second", "--progress", "none")
    assert again.code == 0, again.stderr
    assert files(tmp_path / "first") == files(tmp_path / "second")
    wider = gptq(
        "quantize", "--config", report, "--out", tmp_path / "third", "--bits", "8", "--dry-run", "--json"
    )
    assert wider.document["plan"]["bits"] == 8
    there = gptq("quantize", "--config", report, "--progress", "none")
    assert (there.code, "output-exists" in there.stderr) == (3, True)


def test_a_head_that_has_its_bits_by_itself(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """Nobody gave settings by module, so none are in the way of a run without the head, nor pile up."""
    words = ("--calibration", text, *SIZES, "--recipe", "fast", "--progress", "none")
    done = gptq("quantize", tiny_llama, "--out", tmp_path / "a", "--quantize-head", *words)
    assert done.code == 0, done.stderr
    report = tmp_path / "a" / "report.json"
    assert (settings(tmp_path / "a")["module"], settings(tmp_path / "a")["quantize_head"]) == ([], True)
    without = gptq("quantize", "--config", report, "--no-quantize-head", "--out", tmp_path / "b")
    assert without.code == 0, without.stderr

    document = json.loads(report.read_text(encoding="utf-8"))
    document["settings"]["module"] = ["model.layers.0=bits:8", "lm_head=bits:8"]  # as they were once written
    older = tmp_path / "older.json"
    older.write_text(json.dumps(document), encoding="utf-8")
    again = gptq("quantize", "--config", older, "--out", tmp_path / "c", "--progress", "none")
    assert again.code == 0, again.stderr
    assert settings(tmp_path / "c")["module"] == document["settings"]["module"]
    plan = gptq("quantize", "--config", older, "--no-quantize-head", "--dry-run", "--json")
    assert plan.document["plan"]["head"] is None
