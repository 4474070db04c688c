"""`--fisher-tokens`: the recipes run where no gradients can be taken, and say so; trials count them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptq_cli.jobs import forecast
from tests import architectures
from tests.e2e.commands import Ran, gptq, write_text
from tests.second_opinion import save_source
from tests.tiny import HIDDEN

FAST = ("--samples", "24", "--seq-len", "32", "--group-size", "32", "--progress", "none", "--bits", "4")
BEST = ("--recipe", "best", "--sweeps", "0", "--fisher-tokens", "96")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def quantized(model: Path, out: Path, text: Path, *more: str) -> Ran:
    return gptq("quantize", model, "--out", out, "--calibration", text, *FAST, *BEST, *more)


def warnings_of(document: Any) -> list[str]:
    found = [f for f in document["findings"] if f["rule"] == "gradients-possible"]
    assert {f["level"] for f in found} <= {"warning"}
    return [f["message"] for f in found]


def test_a_model_without_gradients_is_quantized_without_them(text: Path, tmp_path: Path) -> None:
    """Its report, and the run that goes by it, have none asked for. Zamba2 adds the embeddings once more
    between two blocks, and some of its blocks share weights."""
    model = save_source(architectures.build("zamba2"), tmp_path / "model")
    ran = quantized(model, tmp_path / "q", text, "--group-size", "16", "--json")
    assert ran.code == 0, ran.stderr
    (message,) = warnings_of(ran.document)
    assert "blocks share weights" in message
    assert ran.document["settings"]["fisher_tokens"] == 0


def test_a_plan_has_the_files_and_the_time(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    words = (tiny_llama, tmp_path / "q", text, "--dry-run", "--json")
    plain, weighed = (quantized(*words, "--fisher-tokens", n).document for n in ("0", "70"))
    assert plain["plan"]["gradient_bytes"] == 0
    assert weighed["plan"]["gradient_bytes"] == (plain["blocks"] + 1) * 96 * HIDDEN * 4  # of whole samples
    assert weighed["verdict"] == plain["verdict"] == "fits"


def test_several_processes_plan_without_gradients(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    words = (tiny_llama, tmp_path / "q", text, "--dry-run", "--json", "--processes")
    alone, shared = (quantized(*words, n).document for n in ("1", "2"))
    assert warnings_of(alone) == []
    assert alone["plan"]["gradient_bytes"] > 0
    (message,) = warnings_of(shared)
    assert "2 processes share the work" in message
    assert shared["plan"]["gradient_bytes"] == 0


def test_a_trial_takes_no_gradients_and_counts_them(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (tiny_llama, tmp_path / "q", text, "--blocks", "1", "--json")
    plain = quantized(*words, "--fisher-tokens", "0").document
    monkeypatch.setattr(forecast, "gradient_seconds", lambda *_: 1e5)
    ran = quantized(*words)
    assert ran.code == 0, ran.stderr
    assert ran.document["seconds"] > 1e3 > plain["seconds"]
    assert ran.document["gradient_bytes"] > plain["gradient_bytes"] == 0
    losses = [[linear["loss"] for linear in d["blocks"][0]["linears"]] for d in (ran.document, plain)]
    assert losses[0] == losses[1]
