"""Tuning a whole model block by block: its loss and its gradients are those of the model in one piece."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_cli.engine import going_back, model_tail
from gptq_cli.engine import run as run_module
from gptq_cli.engine.tuned import Tuned
from gptq_cli.engine.tuning import CalibrationText, TunedModel, split, tune_model
from gptq_cli.events import ignore
from gptq_cli.gptq.tuning import Moving
from tests.conftest import TinyFactory
from tests.e2e.commands import gptq

FAST = ("--samples", "10", "--seq-len", "24", "--group-size", "32", "--progress", "none", "--sweeps", "0")
Looked = Callable[[TunedModel, CalibrationText], None]


def looked_at(
    model: Path, text: Path, out: Path, patch: pytest.MonkeyPatch, look: Looked, *more: str
) -> None:
    """Quantize, and `look` at what is about to be tuned; then tune it."""

    def tune(model: TunedModel, text: CalibrationText, epochs: int, observer: Any) -> Tuned:
        look(model, text)
        return tune_model(model, text, epochs, ignore)

    patch.setattr(run_module, "tune_model", tune)
    words = ("--calibration", text, "--dense-share", "1", "--tune-epochs", "1")
    ran = gptq("quantize", model, "--out", out, *FAST, *words, *more)
    assert ran.code == 0, ran.stderr


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama_tied", ()),
        ("gpt2", ("--desc-act",)),  # Conv1D, biases
        ("gemma2", ("--asym", "--batch-size", "3")),  # caps logits, norms outputs
        ("opt", ("--bits", "3")),
        (
            "falcon",
            ("--module", "transformer.h.*.self_attention.dense=bits:8"),
        ),  # attention and MLP side by side
        ("qwen3_moe", ()),  # experts that are parts of one tensor; a dense block before them
        ("mixtral", ("--bits", "3")),
    ],
)
def test_losses_and_gradients(
    name: str,
    more: tuple[str, ...],
    tiny: TinyFactory,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_tail, "TUNE_LOGITS", 7 * 512)  # seven tokens at a time
    gradients: dict[int, Tensor] = {}

    def noted(moving: Moving, gradient: Tensor, rate: float) -> None:
        gradients[id(moving)] = gradient

    def look(model: TunedModel, text: CalibrationText) -> None:
        samples = [1, 4, 6]
        with monkeypatch.context() as patch:
            patch.setattr(Moving, "step", noted)
            model.step(samples, text, 1.0)
        block = model.blocks[-1]
        moving = [linear.scales for linear in block.linears.values()]
        moving += [*block.vectors.values(), *model.tail.vectors.values()]
        slopes, found = [], []
        for one in moving:
            if id(one) not in gradients:
                continue  # the loss does not depend on it
            direction = gradients[id(one)].sign() * one.start.float().abs()
            start, losses = one.start, []
            for by in (2e-2, -2e-2):
                one.start = (start.float() + by * direction).to(start.dtype)
                losses.append(model.loss(samples, text, 0.0))
            one.start = start
            slopes.append((losses[0] - losses[1]) / 4e-2)
            found.append(float((gradients[id(one)] * direction).sum()))
        assert len(slopes) > len(block.linears)
        assert found == pytest.approx(slopes, rel=0.05, abs=1e-5)

    source = tiny(name)
    if name in ("qwen3_moe", "mixtral"):
        source = with_all_experts(source, tmp_path / "model")
    looked_at(source, text, tmp_path / "q", monkeypatch, look, *more)


def with_all_experts(model: Path, folder: Path) -> Path:
    """The same, with every token sent to all experts: it cannot be sent to others, a jump of which a gradient
    knows nothing."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    count = config.get("num_experts") or config["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": count}))
    return folder


def test_gradients_do_not_vanish_in_float16(
    tiny: TinyFactory, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would where the loss was a mean over 2048 tokens: one that is 16 times as large has the same."""
    sums = model_tail.divergence

    def look(model: TunedModel, text: CalibrationText) -> None:
        found: list[dict[int, Tensor]] = []
        for factor in (1.0, 16.0):
            gradients: dict[int, Tensor] = {}
            with monkeypatch.context() as patch:
                patch.setattr(model_tail, "divergence", lambda a, b, by=factor: by * sums(a, b))
                patch.setattr(Moving, "step", lambda one, g, _, into=gradients: into.update({id(one): g}))
                model.step(range(16), text, 1.0)
            found.append(gradients)
        plain, larger = found
        assert len(plain) > len(model.blocks[0].linears)
        for moving, gradient in plain.items():
            off = (larger[moving].float() / 16 - gradient.float()).norm() / gradient.float().norm()
            assert float(off) < 0.02

    words = ("--samples", "18", "--seq-len", "128", "--dtype", "float16")
    looked_at(tiny("llama", dtype=torch.float16), text, tmp_path / "q", monkeypatch, look, *words)


def test_a_function_without_a_deterministic_kernel_is_run_as_it_is(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was added up before torch refused does not count."""

    @contextmanager
    def refused(device: torch.device) -> Iterator[None]:
        yield
        raise RuntimeError("it has none, but you set 'torch.use_deterministic_algorithms(True)'")

    def look(model: TunedModel, text: CalibrationText) -> None:
        found: list[dict[int, Tensor]] = []
        for refuse in (False, True):
            gradients: dict[int, Tensor] = {}
            with monkeypatch.context() as patch:
                patch.setattr(Moving, "step", lambda one, g, _, into=gradients: into.update({id(one): g}))
                if refuse:
                    patch.setattr(going_back, "deterministic", refused)
                model.step([1, 4, 6], text, 1.0)
            found.append(gradients)
        plain, again = found
        assert plain
        assert all(torch.equal(plain[moving], again[moving]) for moving in plain)

    looked_at(tiny_llama, text, tmp_path / "q", monkeypatch, look, "--batch-size", "1")


def test_the_loss_is_that_of_the_checkpoint(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what was measured."""
    from transformers import AutoModelForCausalLM

    import gptq_cli
    from gptq_cli.evaluation.divergence import compare

    seen: list[CalibrationText] = []
    out = tmp_path / "q"
    looked_at(tiny_llama, text, out, monkeypatch, lambda _, samples: seen.append(samples), "--bits", "2")
    _, held = split(sorted(seen[0].goals))
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto").eval()
    found = compare(gptq_cli.load(str(out)), dense, seen[0].input_ids[held])
    report = gptq("report", out, "--json").document["tuning"]
    assert report["kl_after"] == pytest.approx(found.kl, rel=1e-3)
    assert report["held_out_samples"] == len(held)


def test_samples_are_split_the_same_way_every_time() -> None:
    training, held = split(range(128))
    assert len(held) == 16
    assert sorted((*training, *held)) == list(range(128))
    assert split([0, 1]) == ([0], [1])
    assert split([3]) == ([], [3])
