"""What fewer bits cost: equal to rounding one set in a whole model, and no trace of it is left behind."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.engine.bit_losses import Fused, measure_bit_losses
from gptq_cli.engine.loop import LoopOptions
from gptq_cli.engine.opening import EngineRun
from gptq_cli.errors import NonFinite
from gptq_cli.events import Event, PhaseAdvanced
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.jobs.steps import placed, watched
from gptq_cli.model.blocks import assign, weight_matrix
from gptq_cli.model.describe import model_facts
from gptq_cli.model.find import find_model
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.results.bits import TRIAL_BITS, BitLosses
from tests import reference
from tests.conftest import TinyFactory
from tests.tiny import VOCAB

CONFIG = QuantizeConfig(group_size=32, quantize_head=True, sweeps=0, refit=False)
IDS = torch.randint(0, VOCAB, (6, 32), generator=torch.Generator().manual_seed(5))
SAMPLES, WINDOWS = IDS[:4], IDS[4:]


def measured(model: Path, events: list[Event] | None = None) -> dict[Fused, BitLosses]:
    job = QuantizeJob(
        model=ModelRef(model=str(model)), out="q", quantize=CONFIG, calibration=CalibrationConfig()
    )
    skeleton = select_linears(open_skeleton(find_model(job.model), job.model), CONFIG)
    facts = model_facts(skeleton)
    _, resolution, _ = placed(job, skeleton, facts)
    assert resolution.placement is not None
    assert resolution.schedule is not None
    run = EngineRun(
        skeleton=skeleton,
        placement=resolution.placement,
        schedule=resolution.schedule,
        config=CONFIG,
        options=LoopOptions(strict=False, devices=watched(resolution.placement)),
    )
    sets: dict[tuple[str, str], list[str]] = {}
    for linear in facts.packed:
        sets.setdefault(linear.fused_with, []).append(linear.name)
    said = events if events is not None else []
    return measure_bit_losses(run, [tuple(held) for held in sets.values()], SAMPLES, WINDOWS, said.append)


def log_probabilities(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=WINDOWS, use_cache=False).logits.double(), -1)


def rounded_alone(path: Path, fused: Fused) -> tuple[float, float]:
    """(divergence, loss of the first linear) of the whole model with one set at TRIAL_BITS: what each linear
    of it read is gathered by hooks, and its codes come from the solver."""
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    hook = dense.get_submodule(fused[0]).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for sample in SAMPLES:
            dense(input_ids=sample.unsqueeze(0), use_cache=False)
    hook.remove()
    H = reference.hessian(torch.cat([x.flatten(0, -2) for x in seen])).float()
    model, config = copy.deepcopy(dense), replace(CONFIG, bits=TRIAL_BITS)
    weights = [weight_matrix(model.get_submodule(name)).float() for name in fused]
    if fused == ("lm_head",):  # it may be the embedding, too
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    solved = quantize_linears([weight.clone() for weight in weights], H, config)
    for name, one in zip(fused, solved, strict=True):
        assign(model.get_submodule(name), one.dequantize())
    p, q = log_probabilities(dense), log_probabilities(model)
    return float((p.exp() * (p - q)).sum(-1).mean()), solved[0].loss


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_a_set_costs_what_it_costs_in_a_whole_model(tiny: TinyFactory, name: str) -> None:
    path = tiny(name)
    found = measured(path)
    assert ("lm_head",) in found
    sets = list(found)
    for fused in (sets[0], sets[1], sets[-2], sets[-1]):
        kl, loss = rounded_alone(path, fused)
        assert found[fused].kl == pytest.approx(kl, rel=0.02), fused
        if len(fused) == 1:  # else the mean of all of them
            assert found[fused].losses[TRIAL_BITS] == pytest.approx(loss, rel=0.05), fused  # some rows


def test_losses_fall_with_the_bits_and_repeat(tiny: TinyFactory) -> None:
    events: list[Event] = []
    found = measured(tiny("qwen3_moe"), events)
    for fused, one in found.items():
        assert one.losses[2] > 2 * one.losses[TRIAL_BITS] > 0, fused
        assert one.predicted(None) == 0.0
        assert one.predicted(TRIAL_BITS) == one.kl
        assert one.predicted(4) == pytest.approx(one.kl / 4)
        assert one.predicted(8) == pytest.approx(one.kl / 4**5)
        assert one.predicted(2) == pytest.approx(one.kl * one.losses[2] / one.losses[TRIAL_BITS])
    experts = [fused for fused in found if ".experts." in fused[0]]
    assert experts
    assert all(".experts." in name for fused in experts for name in fused)  # those of a block are one set
    assert [event.done for event in events if isinstance(event, PhaseAdvanced) and event.phase == "bits"]
    assert measured(tiny("qwen3_moe")) == found


def test_a_weight_that_is_not_finite_is_named(tiny: TinyFactory, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(NonFinite, match=r"model\.layers\.1\.mlp"):
        measured(tmp_path / "bad")
