"""`--fisher-tokens`: the recipes run where no gradients can be taken, and say so; trials count them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.checkpoint import kept_states
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.engine import block as block_module
from gptq_cli.engine import gradient_pass
from gptq_cli.errors import GptqError
from gptq_cli.jobs import forecast
from tests import architectures
from tests.e2e.commands import Ran, gptq
from tests.e2e.killed import content
from tests.second_opinion import save_source
from tests.tiny import HIDDEN

FAST = ("--samples", "24", "--seq-len", "32", "--group-size", "32", "--progress", "none", "--bits", "4")
BEST = ("--recipe", "best", "--sweeps", "0", "--fisher-tokens", "96")


def quantized(model: Path, out: Path, text: Path, *more: str) -> Ran:
    return gptq("quantize", model, "--out", out, "--calibration", text, *FAST, *BEST, *more)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("expected") / "q"
    assert quantized(tiny_llama, out, text).code == 0
    return content(out)


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


def test_a_model_whose_modules_keep_a_state(text: Path, tmp_path: Path) -> None:
    model = save_source(architectures.build("recurrent_gemma"), tmp_path / "model")
    ran = quantized(model, tmp_path / "q", text)
    assert ran.code == 0, ran.stderr


def test_a_disk_that_is_full(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tensors: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept_states, "write_snapshot", full)
    ran = quantized(tiny_llama, tmp_path / "q", text)
    assert ran.code == 1
    assert "gradients cannot be kept" in ran.stderr
    assert "no space left" in ran.stderr
    assert "--fisher-tokens 0" in ran.stderr


@pytest.mark.parametrize("finished", [0, 1])
def test_interrupted(
    finished: int,
    tiny_llama: Path,
    text: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same command goes on with the gradients that were taken, and has the same bytes."""
    out, passes = tmp_path / "q", []
    take = gradient_pass._Pass

    def counted(*words: Any) -> Any:
        passes.append(1)
        return take(*words)

    monkeypatch.setattr(gradient_pass, "_Pass", counted)
    kept = stopped_after(finished, tiny_llama, out, text, monkeypatch)
    assert sorted(path.name for path in kept.iterdir())[-1] == "complete.json"
    ran = quantized(tiny_llama, out, text, "--resume", "required")
    assert ran.code == 0, ran.stderr
    assert len(passes) == 1
    assert content(out) == expected
    assert not kept.parent.exists()


def test_gradients_that_were_damaged_meanwhile(
    tiny_llama: Path,
    text: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "q"
    kept = stopped_after(1, tiny_llama, out, text, monkeypatch)
    file = kept / "00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    ran = quantized(tiny_llama, out, text, "--resume", "required")
    assert ran.code == 0, ran.stderr
    said = " ".join(ran.stderr.split())
    assert "they are taken again: 00001.safetensors is damaged: its digest does not fit" in said
    assert content(out) == expected


def test_gradients_that_are_gone_before_a_block_was_finished(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q"
    (stopped_after(0, tiny_llama, out, text, monkeypatch) / "complete.json").unlink()
    ran = quantized(tiny_llama, out, text)
    assert ran.code == 0, ran.stderr
    assert "gradients are not as they were kept; they are taken again" in ran.stderr.replace("\n", " ")
    assert list(tmp_path.glob(".*.gptq")) == []


def test_gradients_that_are_gone_after_the_last_block_are_not_missed(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q"

    def stopped(*words: Any) -> None:
        raise GptqError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "complete", stopped)
        assert quantized(tiny_llama, out, text).code == 1
    (kept,) = tmp_path.glob("*.gptq/gradients")
    (kept / "complete.json").unlink()
    ran = quantized(tiny_llama, out, text, "--resume", "required")
    assert ran.code == 0, ran.stderr
    assert "gradients" not in ran.stderr


def stopped_after(finished: int, model: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run that was stopped after so many blocks has its gradients."""
    blocks, real = [], block_module.output_moments

    def stopped(*words: Any) -> Any:
        blocks.append(1)
        if len(blocks) == finished + 1:
            raise GptqError("stopped")
        return real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(block_module, "output_moments", stopped)
        ran = quantized(model, out, text)
    assert ran.code == 1
    what = "block 0 of 3" if finished else "the gradients for all 3 blocks"
    assert f"{what} from" in ran.stderr.replace("\n", " ")
    (kept,) = out.parent.glob("*.gptq/gradients")
    return kept
