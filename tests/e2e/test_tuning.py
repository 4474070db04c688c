"""`--tune-epochs`: the same codes and other scales, only where it helps; interrupted, the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq_cli.checkpoint import writer as writer_module
from gptq_cli.checkpoint.layout import PlannedShard
from gptq_cli.checkpoint.values import rewrite
from gptq_cli.engine import run as run_module
from gptq_cli.engine import tuning
from gptq_cli.engine.tuning import TunedModel
from gptq_cli.errors import ConfigError, GptqError
from gptq_cli.jobs import forecast, together
from tests.conftest import TinyFactory
from tests.e2e.commands import Ran, gptq
from tests.e2e.killed import content
from tests.e2e.test_resume import shard as damage_codes_of_block_1

FAST = ("--samples", "24", "--seq-len", "32", "--group-size", "32", "--progress", "none", "--bits", "2")
TUNED = ("--recipe", "max", "--sweeps", "0", "--tune-epochs", "4")


@pytest.fixture(autouse=True)
def many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TUNE_STEP_TOKENS", 96)


def quantized(model: Path, out: Path, text: Path, *more: str, interrupted: bool = False) -> Ran:
    words = ("quantize", model, "--out", out, "--calibration", text, *FAST, *TUNED, *more)
    return gptq(*words, interrupted=interrupted)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "q"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "TUNE_STEP_TOKENS", 96)
        assert quantized(tiny_llama, out, text).code == 0
    return out


def test_experts_are_tuned_like_other_linears(tiny_moe: Path, text: Path, tmp_path: Path) -> None:
    tuned, plain = tmp_path / "tuned", tmp_path / "plain"
    assert quantized(tiny_moe, plain, text, "--tune-epochs", "0").code == 0
    ran = quantized(tiny_moe, tuned, text, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["tuning"]["part"] > 0
    assert ran.document["tuning"]["kl_after"] < 0.99 * ran.document["tuning"]["kl_before"]
    before, after = (load_file(out / "model.safetensors") for out in (plain, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"scales", "weight"}
    assert any("experts" in name for name in changed)
    loaded = gptq("load", tuned, "--json")
    assert loaded.code == 0, loaded.stderr


def test_codes_stay_and_the_kl_falls(tiny_llama: Path, text: Path, reference: Path, tmp_path: Path) -> None:
    report = gptq("report", reference, "--json").document
    found = report["tuning"]
    assert found["part"] > 0
    assert found["kl_after"] < 0.99 * found["kl_before"]
    assert (found["samples"], found["held_out_samples"], found["steps"]) == (21, 3, 28)
    assert dict(report["phase_seconds"])["tune"] > 0
    assert quantized(tiny_llama, tmp_path / "q", text, "--tune-epochs", "0").code == 0
    before, after = (load_file(out / "model.safetensors") for out in (tmp_path / "q", reference))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"scales", "weight"}
    assert sum(name.endswith(".scales") for name in changed) == 21
    norms = {name for name in changed if name.endswith(".weight")}
    assert norms == {name for name in before if "norm" in name}
    assert "tuned" in gptq("report", reference).stdout
    assert gptq("load", reference, "--verify").code == 0


def test_what_held_out_samples_speak_against_is_not_taken(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TunedModel.loss

    def contrary(model: TunedModel, samples: Any, text: Any, part: float) -> float:
        return real(model, samples, text, part) + part

    plain, out = tmp_path / "plain", tmp_path / "q"
    assert quantized(tiny_llama, plain, text, "--tune-epochs", "0").code == 0
    monkeypatch.setattr(TunedModel, "loss", contrary)
    ran = quantized(tiny_llama, out, text, "--json")
    assert ran.code == 0
    found = ran.document["tuning"]
    assert (found["part"], found["kl_after"]) == (0, found["kl_before"])
    assert content(out)["model.safetensors"] == content(plain)["model.safetensors"]
    assert "nothing taken" in gptq("report", out).stdout


@pytest.mark.parametrize("where", ["in a step", "while values are written", "when they are written"])
def test_interrupted(
    where: str,
    tiny_llama: Path,
    text: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same command goes on: tuning that was not finished begins again, finished tuning does not."""
    out, tunings = tmp_path / "q", []
    real = run_module.tune_model

    def counted(*words: Any) -> Any:
        tunings.append(words)
        return real(*words)

    monkeypatch.setattr(run_module, "tune_model", counted)
    with monkeypatch.context() as patch:
        if where == "in a step":
            steps, step = [], TunedModel.step

            def stopped(*words: Any) -> None:
                steps.append(1)
                if len(steps) == 3:
                    raise GptqError("stopped")
                step(*words)

            patch.setattr(TunedModel, "step", stopped)
        else:

            def broken(path: Path, shard: PlannedShard, tensors: Mapping[str, Tensor]) -> None:
                some = list(tensors)[: 5 if where == "while values are written" else None]
                rewrite(path, shard, {name: tensors[name] for name in some})
                raise GptqError("stopped")

            patch.setattr(writer_module, "rewrite", broken)
        assert quantized(tiny_llama, out, text).code == 1
    assert not out.exists()
    ran = quantized(tiny_llama, out, text, "--resume", "required", "--json")
    assert ran.code == 0, ran.stderr
    assert content(out) == content(reference)
    assert len(tunings) == (2 if where == "in a step" else 1)
    assert ran.document["tuning"]["steps"] == 28


def test_codes_that_are_damaged_after_the_scales_were_tuned(
    tiny_llama: Path, text: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the blocks before them are not taken with scales that are tuned already."""
    out = tmp_path / "q"

    def broken(path: Path, shard: PlannedShard, tensors: Mapping[str, Tensor]) -> None:
        rewrite(path, shard, tensors)
        damage_codes_of_block_1(path.parent.parent)
        raise GptqError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "rewrite", broken)
        assert quantized(tiny_llama, out, text).code == 1
    ran = quantized(tiny_llama, out, text, "--resume", "required", "--json")
    assert ran.code == 0, ran.stderr
    assert "cannot be used" in ran.stderr
    assert content(out) == content(reference)


def test_what_cannot_be_tuned_is_refused_before_a_weight_is_read(
    tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    for model, more, why in (
        (tiny_llama, ("--quantize-head",), "its head is to be quantized"),
        (tiny_llama, ("--samples", "1"), "none is left to tune on"),
    ):
        ran = quantized(model, tmp_path / "q", text, *more, "--json")
        assert ran.code == 3
        (found,) = [f for f in ran.document["error"]["findings"] if f["rule"] == "tuning-possible"]
        assert why in found["message"]
        assert "--tune-epochs 0" in found["hint"]
    ran = quantized(tiny_llama, tmp_path / "q", text, "--solve-for", "own")
    assert ran.code == 2
    assert "tune_epochs is 4" in ran.stderr


def test_a_trial_does_not_tune_and_counts_it(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (tiny_llama, tmp_path / "q", text, "--blocks", "1", "--json")
    assert quantized(*words, "--tune-epochs", "0").document["seconds"] < 1e3
    monkeypatch.setattr(forecast, "tuning_seconds", lambda *_: 1e5)
    ran = quantized(*words)
    assert ran.code == 0, ran.stderr
    assert [block["name"] for block in ran.document["blocks"]] == ["model.layers.0"]
    assert "tune" not in ran.document["phase_seconds"]
    assert ran.document["seconds"] > 1e3


def test_several_processes_do_not_tune() -> None:
    from gptq_cli.config import ModelRef, QuantizeConfig, QuantizeJob

    job = QuantizeJob(model=ModelRef(model="m"), out="q", quantize=QuantizeConfig.of("max"))
    with pytest.raises(ConfigError, match="allowed with 2 processes: 0"):
        together.check_share(job, 2)


def test_a_dry_run_counts_it(tiny: TinyFactory, text: Path, tmp_path: Path) -> None:
    ran = quantized(tiny("gpt2"), tmp_path / "q", text, "--dry-run", "--json")
    assert ran.code == 0
