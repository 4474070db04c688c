"""The head: what enters it, the pieces of its rows, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine import head as head_module
from gptq_cli.engine.head import HeadWork, quantize_head
from gptq_cli.engine.work import WorkOptions
from gptq_cli.errors import GptqError, LinearLost, NonFinite, NotPositiveDefinite, WeightTooLarge
from gptq_cli.events import Event, LinearQuantized, Warned
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.gptq.packing import pack as pack_linear
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.model.blocks import weight_matrix
from gptq_cli.model.skeleton import LinearInfo
from tests.engine.opened import Opened, open_tiny

CPU = torch.device("cpu")


class Run:
    """A tiny model whose blocks are done: its hidden states are those of the dense model."""

    def __init__(self, name: str, config: QuantizeConfig, *, strict: bool = False) -> None:
        self.opened: Opened = open_tiny(name)
        self.events: list[Event] = []
        self.stored: dict[str, PackedTensors] = {}
        model = self.opened.model
        self.head = model.get_output_embeddings()
        self.dense = self.head.weight.detach().clone()
        rows, columns = weight_matrix(self.head).shape
        self.work = HeadWork(
            model=model,
            module=self.head,
            flow=self.opened.flow,
            blocks=[SimpleNamespace(module=block, device=CPU) for block in self.opened.blocks],  # type: ignore[misc]
            info=LinearInfo(
                name=next(name for name, module in model.named_modules() if module is self.head),
                block="",
                source_key="lm_head.weight",
                in_features=columns,
                out_features=rows,
                bias=False,
                transposed=False,
            ),
            device=CPU,
            input_device=CPU,
            options=WorkOptions(
                config=config,
                strict=strict,
                store=lambda info, packed: self.stored.update({info.name: packed}),
                observer=self.events.append,
            ),
        )
        self.captured = self.opened.capture()
        last: list[Tensor] = []
        hook = self.opened.blocks[-1].register_forward_hook(
            lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
        self.inputs: list[Tensor] = []
        before = self.head.register_forward_pre_hook(lambda module, args: self.inputs.append(args[0]))
        with torch.no_grad():
            for batch in self.captured.samples:
                model(input_ids=self.opened.input_ids[list(batch)], use_cache=False)
        hook.remove()
        before.remove()
        self.captured.hidden[:] = last

    def __call__(self) -> Any:
        return quantize_head(self.work, self.captured, self.opened.input_ids)


CONFIG = QuantizeConfig(bits=8, group_size=32, solve_for="own")


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bloom"])
def test_its_input_is_what_the_model_hands_to_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = head_module._input

    def noted(*words: Any) -> Tensor:
        seen.append(original(*words))
        return seen[-1]

    monkeypatch.setattr(head_module, "_input", noted)
    run = Run(name, CONFIG)
    report = run()
    assert len(seen) == len(run.inputs) == 3
    for found, wanted in zip(seen, run.inputs, strict=True):
        assert torch.equal(found, wanted)
    assert report.tokens == run.opened.input_ids.numel()
    assert run.captured.hidden == []
    assert torch.equal(run.head.weight, run.dense), "the head may be the embedding too"
    assert not any("forward" in module.__dict__ for module in (run.head, *run.opened.blocks))


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 rows in pieces of 96: the same codes as all at once, packed side by side, and one account."""
    monkeypatch.setattr(head_module, "HEAD_ROWS", 96)
    run = Run("llama", QuantizeConfig(bits=4, group_size=32))
    report = run()
    x = torch.cat([one.reshape(-1, 64) for one in run.inputs]).float()
    (whole,) = quantize_linears([run.dense], x.T @ x / len(x), run.work.options.config)
    wanted, found = pack_linear(whole, 4, "gptq"), run.stored[run.work.info.name]
    assert found.qweight.shape == wanted.qweight.shape
    assert (found.qweight != wanted.qweight).float().mean() < 0.02  # sums are rounded in another order
    assert torch.equal(found.g_idx, wanted.g_idx)
    assert found.qzeros.shape == wanted.qzeros.shape
    torch.testing.assert_close(found.scales, wanted.scales, rtol=2e-2, atol=1e-4)
    assert report.loss == pytest.approx(whole.loss, rel=1e-2)
    assert report.rtn_loss == pytest.approx(whole.rtn_loss, rel=1e-3)
    assert report.loss < report.rtn_loss


def test_it_has_settings_of_its_own() -> None:
    config = QuantizeConfig.of(bits=4, group_size=32, quantize_head=True).for_model((), "lm_head")
    run = Run("llama", config)
    report = run()
    assert (report.bits, report.group_size, report.method) == (8, 32, "gptq")
    assert run.stored["lm_head"].qweight.shape == (64 * 8 // 32, 512)
    (event,) = [event for event in run.events if isinstance(event, LinearQuantized)]
    assert (event.block, event.report) == ("", report)


def test_a_fallback_is_refused_where_it_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("llama", CONFIG, strict=True)
    for hidden in run.captured.hidden:
        hidden.zero_()
    with pytest.raises(NotPositiveDefinite, match="'lm_head' would fall back"):
        run()


@pytest.mark.parametrize("strict", [False, True])
def test_a_head_of_which_nothing_is_left_is_named(strict: bool) -> None:
    run = Run("llama", CONFIG, strict=strict)
    with torch.no_grad():
        run.head.weight *= 1e-12
    if strict:
        with pytest.raises(LinearLost, match="'lm_head' is lost") as caught:
            run()
        assert caught.value.hint == "leave --quantize-head out"
        return
    assert run().loss == pytest.approx(1.0)
    (warned,) = [event for event in run.events if isinstance(event, Warned)]
    assert warned.message.startswith(
        "'lm_head' is lost, the relative error of its output is 1.0000: its weights"
    )
    assert warned.hint == "leave --quantize-head out"


def test_a_head_with_a_weight_that_is_too_large_may_stay_dense() -> None:
    run = Run("llama", CONFIG)
    with torch.no_grad():
        run.head.weight[3, 5] = 1e9
    with pytest.raises(WeightTooLarge, match=r"^lm_head: the weight reaches 1e\+09") as caught:
        run()
    assert caught.value.hint == "leave --quantize-head out"


def test_what_is_not_finite_is_named() -> None:
    run = Run("llama", CONFIG)
    run.captured.hidden[1][0, 3] = torch.nan
    with pytest.raises(NonFinite, match=r"lm_head.*sample 2"):
        run()


def test_a_model_that_does_not_reach_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("llama", CONFIG)
    monkeypatch.setattr(run.work.model, "forward", lambda **words: None)
    with pytest.raises(GptqError, match="lm_head got no input for 48 tokens"):
        run()
