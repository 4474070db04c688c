"""A repaired map is one that no rule refuses, and as much as possible the one that was meant."""

from __future__ import annotations

import random

import pytest

from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.planning.repair import beyond_last, known_names, nearest_names, repaired
from tests.preflight.shapes import BIG, case, llama, resolved, rules_of

TIED = llama(tied=True)
PLAIN = llama()


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("model.layers.0-5=0,rest=1", "model.layers.0-5=0,rest=1"),
        ("model.layers.0-3=2,model.layers.4=7,rest=0", "model.layers.0-3=1,model.layers.4=1,rest=0"),
        ("model.layer.0-5=0,lmhead=3,rest=1", "model.layers.0-5=0,lm_head=1,rest=1"),
        ("model.layer.*=0,rest=1", "model.layers.*=0,rest=1"),
        ("model.layer.0=0,model.layers.0=1,rest=1", "model.layers.0=1,rest=1"),
        ("model.layers.12-40=0,rest=1", "1"),
        ("model.layers.0-5=meta,rest=0", "model.layers.0-5=cpu,rest=0"),
        ("model.layers.0-10=1,lm_head=0", "model.layers.0-10=1,lm_head=0,rest=0"),
        ("model.layers.3.mlp=1,rest=0", "rest=0,model.layers.3=1"),
        ("model.layers.*.mlp=1,rest=0", "rest=0,model.layers.0-11=1"),
        ("model.layers.*.mlp=1,model.layers.5=0,rest=0", "rest=0,model.layers.0-11=1,model.layers.5=1"),
        ("model.layers.*=0,model.layers.0-11=1,rest=0", "model.layers.0-11=1,rest=0"),
        ("zzz.q=0", "auto"),
        ("balanced", "balanced"),
    ],
)
def test_what_was_meant(spec: str, wanted: str) -> None:
    found, meant = repaired(case(spec, PLAIN)), DeviceMap.parse(wanted)
    names = [tensor.name for tensor in PLAIN.tensors]
    assert found.strategy == meant.strategy
    if meant.rules:
        devices = [
            [(rule.device if (rule := one.rule_for(n)) else None) for n in names] for one in (found, meant)
        ]
        assert devices[0] == devices[1], str(found)
        assert len(found.rules) <= len(meant.rules)


def test_tied_tensors_stay_together() -> None:
    found = repaired(case("lm_head=1,rest=0", TIED))
    assert str(found) == "rest=cuda:0,lm_head=cuda:0"


def test_devices_that_max_memory_leaves_out_are_replaced() -> None:
    found = repaired(case("model.layers.0-3=1,lm_head=cpu,rest=0", max_memory="0=8GiB"))
    assert found.devices == DeviceMap.parse("0").devices


PATTERNS = (
    "model.embed_tokens", "model.embed_token", "model.layers.*", "model.layers.0-5", "model.layers.3",
    "model.layers.7-11", "model.layers.3.mlp", "model.layers.*.self_attn", "model.layer.2-4",
    "model.layers.90", "lm_head",
    "model", "model.norm", "rest", "model.layers.[02468]", "model.layers.2-6.mlp.up_proj", "lm_head.weight",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_no_rule_about_maps_refuses_a_repaired_map(seed: int) -> None:
    draw = random.Random(seed)
    patterns = draw.sample(PATTERNS, draw.randint(1, 6))
    devices = [draw.choice(("0", "1", "3", "cpu", "meta", "disk", "xpu:0")) for _ in patterns]
    spec = ",".join(f"{pattern}={device}" for pattern, device in zip(patterns, devices, strict=True))
    facts = TIED if seed % 2 else PLAIN
    limits = draw.choice((None, "0=20GiB,1=20GiB", "1=20GiB,cpu=20GiB"))
    found = repaired(case(spec, facts, max_memory=limits))
    made = resolved(str(found), facts, BIG, max_memory=limits)
    assert rules_of(made, "error") == [], (spec, str(found))
    assert "rule-without-effect" not in rules_of(made), (spec, str(found))
    assert str(repaired(case(str(found), facts, max_memory=limits))) == str(found)


def test_the_nearest_names_exist() -> None:
    known = known_names(PLAIN)
    for typo in ("model.layer.0-5", "model.layers.3.mlp.gate", "lmhead", "layers.4", "model.layer.20-30"):
        names = nearest_names(typo, known)
        assert names
        assert typo not in names
        assert all(DeviceMap.parse({name: 0}).rule_for(n) for name in names for n in known if n == name)
    assert nearest_names("model.layers.40", known) == []
    assert beyond_last("model.layers.40", known) == "model.layers.0-11"
    assert beyond_last("model.layers.40.mlp", known) == "model.layers.0-11"
    assert beyond_last("lmhead", known) is None
