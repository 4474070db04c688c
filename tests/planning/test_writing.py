"""What writing takes: the whole model in memory, and a pass over its weights for each token."""

from __future__ import annotations

from dataclasses import replace

from gptq_cli.placement.device import CPU, Device
from gptq_cli.planning.rates import MachineRates
from gptq_cli.planning.writing import LOGIT_BYTES, SLOWER_ON_CPU, writing_needs, writing_seconds
from gptq_cli.results.map import DevicePlan
from tests.preflight.shapes import llama

GIB = 1 << 30
GPU = Device.parse("cuda:0")
RATES = MachineRates(
    forward_rate=1e9, hessian_rate=1e9, matmul_rate=1e9, column_seconds=0.0, weight_seconds=0.0
)


def plan(device: str, weights: int = GIB) -> DevicePlan:
    return DevicePlan(
        device=device,
        total_bytes=8 * GIB,
        free_bytes=8 * GIB,
        limit_bytes=4 * GIB,
        weights_bytes=weights,
        working_bytes=0,
        hessian_bytes=0,
        activation_bytes=0,
        packing_bytes=0,
        baseline_bytes=100,
    )


def test_on_the_cpu_the_model_is_there_as_a_whole() -> None:
    facts = llama()
    (need,) = writing_needs(facts, (plan("cpu", weights=7),), CPU, 1000, 4)
    logits = 4 * facts.vocab_size * LOGIT_BYTES
    assert need.needed_bytes > facts.size_bytes + 1000 + logits
    assert need.needed_bytes < facts.size_bytes + 1000 + logits + GIB
    assert need.limit_bytes == 4 * GIB


def test_on_accelerators_the_weights_lie_where_they_are_planned() -> None:
    needs = writing_needs(llama(), (plan("cuda:0"), plan("cpu", weights=7)), GPU, 1000, 4)
    assert [need.device for need in needs] == ["cuda:0", "cpu"]
    assert needs[0].needed_bytes == GIB + 100 + 1000 + 4 * llama().vocab_size * LOGIT_BYTES
    assert needs[1].needed_bytes == 7 + 100


def test_time_grows_with_tokens_and_weights() -> None:
    facts = replace(llama(), blocks=())
    seconds = writing_seconds(facts, 1000, 10, CPU, RATES)
    assert seconds == SLOWER_ON_CPU * 1000 * facts.parameters / 1e9
    assert writing_seconds(facts, 2000, 10, CPU, RATES) == 2 * seconds
    assert writing_seconds(facts, 1000, 10, GPU, RATES) < seconds
    assert writing_seconds(llama(), 1000, 10, CPU, RATES) > seconds  # every step costs something
