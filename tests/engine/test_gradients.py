"""The dense model's gradients, taken block by block: those of the model in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gptq_cli.engine import block as block_module
from gptq_cli.engine import gradient_pass
from gptq_cli.engine.going_back import GoingBack
from gptq_cli.engine.gradients import StatesInMemory, output_moments
from gptq_cli.events import Observer
from gptq_cli.gptq.feedback import OutputMoment, drawn_label_gradient
from tests.conftest import TinyFactory
from tests.e2e.commands import gptq

SAMPLES, LENGTH = 8, 16
WORDS = ("--samples", str(SAMPLES), "--seq-len", str(LENGTH), "--group-size", "32", "--progress", "none")
RECIPE = ("--recipe", "best", "--sweeps", "0", "--fisher-tokens", str(4 * LENGTH))


class Seen:
    """What a run made of the gradients, and of which samples."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.moments: dict[str, Tensor] = {}
        self.samples: list[int] = []
        self.ids = torch.empty(0)
        patch.setattr(block_module, "output_moments", self._moments)
        take = gradient_pass._Pass

        def noted(run: Any, ids: Tensor, observer: Observer) -> Any:
            self.ids, self.samples = ids, gradient_pass.gradient_samples(run.config, ids)
            return take(run, ids, observer)

        patch.setattr(gradient_pass, "_Pass", noted)

    def _moments(
        self, block: nn.Module, linears: Mapping[str, nn.Module], *more: Any
    ) -> dict[str, OutputMoment]:
        found = output_moments(block, linears, *more)
        self.moments |= {f"{len(self.moments)} {name}": one.panels[0][1] for name, one in found.items()}
        return found


def in_one_piece(path: Path, ids: Tensor, samples: list[int]) -> Iterator[Tensor]:
    """The same of the model in Transformers, block by block, its linears in the order of their calls."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    moments: dict[nn.Module, OutputMoment] = {}

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        moment = moments.setdefault(module, OutputMoment(out.shape[-1], out.device))
        out.register_hook(moment.add)  # type: ignore[no-untyped-call]

    kinds = {"Linear", "Conv1D"}
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and module is not model.get_output_embeddings() and "." in name:
            module.register_forward_hook(hook)
    for sample in samples:
        logits = model(ids[sample][None]).logits[0]
        logits.backward(drawn_label_gradient(logits, torch.Generator().manual_seed(sample)))
    yield from (moment.panels[0][1] for moment in moments.values())


@pytest.mark.parametrize(
    ("name", "more"),
    [("llama", ()), ("llama", ("--quantize-head",)), ("gpt2", ("--batch-size", "3")), ("gemma2", ())],
)
def test_moments_are_those_of_the_model_in_one_piece(
    tiny: TinyFactory,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    more: tuple[str, ...],
) -> None:
    model, seen = tiny(name), Seen(monkeypatch)
    ran = gptq("quantize", model, "--out", tmp_path / "q", "--calibration", text, *WORDS, *RECIPE, *more)
    assert ran.code == 0, ran.stderr
    assert seen.samples == [1, 3, 5, 7]
    expected = sorted(float(A.trace()) for A in in_one_piece(model, seen.ids, seen.samples))
    found = sorted(float(A.trace()) for A in seen.moments.values())
    assert len(found) == len(expected)
    assert found == pytest.approx(expected, rel=2e-2)


def test_an_operation_without_a_gradient_is_told(
    tiny: TinyFactory, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_through = gradient_pass.run_through

    def broken(block: nn.Module, call: Any, hidden: Tensor) -> Tensor:
        return run_through(block, call, hidden).detach()

    monkeypatch.setattr(gradient_pass, "run_through", broken)
    ran = gptq("quantize", tiny("llama"), "--out", tmp_path / "q", "--calibration", text, *WORDS, *RECIPE)
    assert ran.code == 0, ran.stderr
    assert "no gradients: model.layers." in ran.stderr
    assert "rows are solved apart" in ran.stderr


@pytest.mark.parametrize(
    ("in_a_block", "words"),
    [
        (False, "no gradients: those behind model.layers.2 are not finite; rows are solved apart"),
        (True, "more are not finite: rows are solved apart"),
    ],
)
def test_gradients_that_are_not_finite_are_told(
    tiny: TinyFactory,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_a_block: bool,
    words: str,
) -> None:
    class Overflowing(StatesInMemory):
        def read(self, block: int) -> Mapping[int, Callable[[], Tensor]]:
            kept, factor = super().read(block), torch.inf if self.complete == in_a_block else 1.0
            return {sample: lambda get=get: get() * factor for sample, get in kept.items()}  # type: ignore[misc]

    monkeypatch.setattr("gptq_cli.jobs.quantizing.StatesOnDisk", lambda folder: Overflowing())
    ran = gptq("quantize", tiny("llama"), "--out", tmp_path / "q", "--calibration", text, *WORDS, *RECIPE)
    assert ran.code == 0, ran.stderr
    assert words in ran.stderr
    assert "hint: float16 may overflow: try --dtype bfloat16" in ran.stderr


def test_a_head_without_weights_is_told(
    tiny: TinyFactory, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matmul with a weight that is not there gives what lay in memory, on some devices."""
    opened = gradient_pass.open_dense_part

    def without_norm(*words: Any, **more: Any) -> Any:
        model = opened(*words, **more)
        model.model.norm.to("meta")
        return model

    monkeypatch.setattr(gradient_pass, "open_dense_part", without_norm)
    ran = gptq("quantize", tiny("llama"), "--out", tmp_path / "q", "--calibration", text, *WORDS, *RECIPE)
    assert ran.code == 0, ran.stderr
    assert "no gradients: model.norm lies behind the blocks" in ran.stderr


def test_states_that_a_module_keeps_stay_what_they_were() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.state: Tensor | None = None

        def forward(self, hidden: Tensor) -> Tensor:
            self.state = self.linear(hidden)
            self.seen = self.state
            return hidden + self.state

    block = Recurrent().requires_grad_(False)
    hidden, gradient = torch.randn(2, 3, 4), torch.ones(2, 3, 4)
    back = GoingBack(block, torch.device("cpu"))
    found = back(block, hidden, gradient)
    torch.testing.assert_close(found, gradient + gradient @ block.linear.weight)
    assert block.state is None
    assert not hasattr(block, "seen")
    assert not back.plain
