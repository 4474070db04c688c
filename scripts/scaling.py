#!/usr/bin/env python3
"""The table of docs/scaling.md: what several processes gain, as `planning.ranks` predicts.

    python scripts/scaling.py [--ranks 2 4 8 64] [--link 20]

Models are given by their shapes, and the card by the rates below, which are assumptions: nothing is measured
and no weight is read. `gptq quantize MODEL --dry-run --processes N` says the same of a real model, from a
probe of this machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import LinearFact, ModelFacts, TensorFact
from gptq_cli.placement.cards import CARDS
from gptq_cli.placement.device import CPU
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import least_of, parse_inventory, places_for
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.ranks import ranks_plan
from gptq_cli.planning.rates import MachineRates, rates_of
from gptq_cli.preflight.resolve import resolve
from gptq_cli.results.map import RanksPlan

RATES = replace(rates_of(CARDS["h100"]), disk_rate=5e9)
"""Half of an H100's data sheet, and fast disks: assumed, not measured."""
MACHINE = ",".join([*(f"cuda:{number}=80GiB" for number in range(8)), "cpu=1900GiB"])
"""Each machine of several."""
Linears = tuple[tuple[str, int, int, int], ...]
"""(name, K, N, stage)."""


@dataclass(frozen=True)
class Shape:
    """A model, reduced to what takes time."""

    name: str
    hidden: int
    blocks: int
    attention: Linears
    inner: int
    """Of the dense MLP."""
    vocab: int
    experts: int = 0
    expert_inner: int = 0
    experts_per_token: int = 0
    dense_blocks: int = 0
    """Blocks without experts, in a model that has some."""

    def linears(self, index: int) -> Iterator[LinearFact]:
        """Of one block."""
        block = f"model.layers.{index}"
        for name, columns, rows, stage in self.attention:
            yield _linear(block, f"self_attn.{name}", columns, rows, stage)
        stage = 1 + max(stage for *_, stage in self.attention)
        if not self.experts or index < self.dense_blocks:
            yield from self._mlp(block, "mlp", self.inner, stage, routed=False)
            return
        yield from self._mlp(block, "mlp.shared_experts", self.expert_inner, stage, routed=False)
        for expert in range(self.experts):
            at = stage + 2 + 2 * expert
            yield from self._mlp(block, f"mlp.experts.{expert}", self.expert_inner, at, routed=True)

    def _mlp(self, block: str, name: str, inner: int, stage: int, *, routed: bool) -> Iterator[LinearFact]:
        for part in ("gate_proj", "up_proj"):
            yield _linear(block, f"{name}.{part}", self.hidden, inner, stage, routed=routed)
        yield _linear(block, f"{name}.down_proj", inner, self.hidden, stage + 1, routed=routed)


def _linear(block: str, name: str, k: int, n: int, stage: int, *, routed: bool = False) -> LinearFact:
    return LinearFact(
        name=f"{block}.{name}", block=block, in_features=k, out_features=n, stage=stage, routed=routed
    )


def _attention(hidden: int, kv: int) -> Linears:
    return (
        ("q_proj", hidden, hidden, 0),
        ("k_proj", hidden, kv, 0),
        ("v_proj", hidden, kv, 0),
        ("o_proj", hidden, hidden, 1),
    )


LATENT = (
    ("q_a_proj", 7168, 1536, 0),
    ("kv_a_proj", 7168, 576, 0),
    ("q_b_proj", 1536, 24576, 1),
    ("kv_b_proj", 512, 32768, 2),
    ("o_proj", 16384, 7168, 3),
)
MODELS = (
    Shape("8B", 4096, 32, _attention(4096, 1024), 14336, 128256),
    Shape("70B", 8192, 80, _attention(8192, 1024), 28672, 128256),
    Shape("671B (256 experts)", 7168, 61, LATENT, 18432, 129280, 256, 2048, 8, 3),
)


def facts_of(shape: Shape) -> ModelFacts:
    """The facts of a model in bfloat16."""
    blocks = tuple(f"model.layers.{index}" for index in range(shape.blocks))
    linears = tuple(linear for index in range(shape.blocks) for linear in shape.linears(index))
    weights = [(f"{x.name}.weight", x.in_features * x.out_features) for x in linears]
    weights += [(f"{name}.weight", shape.vocab * shape.hidden) for name in ("model.embed_tokens", "lm_head")]
    return ModelFacts(
        model=shape.name,
        architecture="",
        dtype="bfloat16",
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        max_positions=4096,
        blocks=blocks,
        modules=("model", "model.embed_tokens", *blocks, "lm_head"),
        order=("model", "model.embed_tokens", *blocks, "lm_head"),
        tensors=tuple(TensorFact(name, numbers, 2 * numbers) for name, numbers in weights),
        uncalled=frozenset(),
        tied=(),
        linears=linears,
        routed_share=shape.experts_per_token / shape.experts if shape.experts else 1.0,
    )


def plan_of(facts: ModelFacts, ranks: int, rates: MachineRates) -> tuple[Schedule, RanksPlan, int]:
    """As preflight plans it: the schedule, what is predicted, and what the fullest card needs."""
    work = Work(QuantizeConfig(group_size=128), CalibrationConfig(samples=128, seq_len=2048), ranks)
    places = places_for(ranks, parse_inventory(MACHINE))
    found = resolve(DeviceMap.parse("auto"), facts, least_of(places), work=work, places=places)
    if found.schedule is None:
        raise SystemExit(f"{facts.model} does not fit: {found.report.findings}")
    needed = max(plan.needed_bytes for plan in found.devices if plan.device != str(CPU))
    return found.schedule, ranks_plan(facts, work, found.schedule, rates, ranks), needed


def row(shape: Shape, counts: list[int], rates: MachineRates) -> dict[str, object]:
    """Minutes of one process, how many times as fast several are, up to how many pay, and of 8 the GiB that
    leave one for a block and that its card needs."""
    facts = facts_of(shape)
    plans = {n: plan_of(facts, n, rates) for n in (1, 8, *counts)}
    alone, (_, eight, needed) = plans[1][1].seconds or 0.0, plans[8]
    return {
        "model": shape.name,
        "minutes": round(alone / 60, 1),
        "speed_up": {n: round(alone / (plans[n][1].seconds or 1.0), 1) for n in counts},
        "most_that_pay": eight.most_that_pay,
        "gib_per_block": round(eight.bytes_per_block / 2**30, 1),
        "gib_on_card": round(needed / 2**30, 1),
        "phases_of_8": {one.phase: [round(one.alone_seconds), round(one.seconds)] for one in eight.phases},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 64])
    parser.add_argument("--link", type=float, default=20.0, help="GB/s between ranks")
    asked = parser.parse_args()
    heads = "more gain < 5 % | of 8: GiB a block | GiB on a card |"
    print("| model | 1 |", " | ".join(map(str, asked.ranks)), "|", heads)
    print("|---" * (len(asked.ranks) + 5) + "|")
    rates = replace(RATES, ranks_rate=asked.link * 1e9)
    rows = [row(shape, asked.ranks, rates) for shape in MODELS]
    for found in rows:
        gains = " | ".join(str(gain) for gain in found["speed_up"].values())  # type: ignore[attr-defined]
        last = f"{found['most_that_pay']} | {found['gib_per_block']} | {found['gib_on_card']}"
        print(f"| {found['model']} | {found['minutes']} min | {gains} | {last} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
