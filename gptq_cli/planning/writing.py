"""What it takes when the model writes its calibration text itself: the whole model at once, and time.

Writing goes token by token through the whole model, so the model has to rest on its devices as a whole, with
the keys and values of the rows that are written side by side. A token costs a pass over all weights, at less
than the speed of a forward over many tokens: few rows per step, and a cache that is read in each.
"""

from __future__ import annotations

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.planning.cases import DeviceNeed
from gptq_cli.planning.memory import cpu_baseline_bytes
from gptq_cli.planning.rates import MachineRates
from gptq_cli.results.map import DevicePlan

LOGIT_BYTES = 16
"""For each row and token of the vocabulary: logits in the model's dtype, in float32, a copy to sort."""
SLOWER_ON_CPU, SLOWER = 6.0, 3.0
"""Than a forward over many tokens. On CPU: SmolLM2-135M, 32 rows of 256 tokens; elsewhere assumed."""
STEP_SECONDS = 2e-4
"""Of each block in each step, whatever its size."""


def writing_needs(
    facts: ModelFacts, plans: tuple[DevicePlan, ...], main: Device, cache_bytes: int, rows: int
) -> tuple[DeviceNeed, ...]:
    """Device by device; `cache_bytes`: the keys and values of all `rows`, which lie on the main device."""
    needs = []
    for plan in plans:
        weights, baseline = plan.weights_bytes, plan.baseline_bytes
        if main == CPU and plan.device == str(CPU):  # its blocks are read one at a time otherwise
            weights, baseline = facts.size_bytes, max(baseline, cpu_baseline_bytes(facts))
        working = cache_bytes + rows * facts.vocab_size * LOGIT_BYTES if plan.device == str(main) else 0
        needs.append(DeviceNeed(plan.device, weights + baseline + working, plan.limit_bytes))
    return tuple(needs)


def writing_seconds(facts: ModelFacts, tokens: int, rows: int, device: Device, speed: MachineRates) -> float:
    """Seconds for `tokens` tokens, `rows` of them in each step."""
    slower = SLOWER_ON_CPU if device == CPU else SLOWER
    routed = sum(x.in_features * x.out_features for x in facts.linears if x.routed)
    run = facts.parameters - round(routed * (1 - facts.routed_share))
    steps = -(-tokens // max(1, rows))
    return slower * tokens * run / speed.forward_rate + steps * len(facts.blocks) * STEP_SECONDS
