"""What each reader accepts: the portable default passes everywhere, every departure is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptq_cli.errors import ConfigError
from gptq_cli.findings import Level
from gptq_cli.targets.check import TARGETS, Target, TargetFacts, TargetLinear, check_target


def linear(name: str = "model.layers.0.mlp.down_proj", **changed: Any) -> TargetLinear:
    fields: dict[str, Any] = {
        "name": name,
        "in_features": 4096,
        "out_features": 1024,
        "bits": 4,
        "group_size": 128,
    }
    return TargetLinear(**(fields | changed))


PORTABLE = TargetFacts(
    bits=4,
    group_size=128,
    sym=True,
    desc_act=False,
    checkpoint_format="gptq",
    dtype="float16",
    linears=tuple(
        linear(f"model.layers.0.{name}")
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        )
    ),
)


def levels(target: Target, facts: TargetFacts) -> dict[str, Level]:
    return {finding.rule: finding.level for finding in check_target(target, facts) if finding.level != "note"}


@pytest.mark.parametrize("target", TARGETS)
def test_the_portable_default_passes_everywhere(target: Target) -> None:
    assert levels(target, PORTABLE) == {}


def every(**changed: Any) -> TargetFacts:
    """Changed settings of the checkpoint and, where they have them, of all linears."""
    own = {key: value for key, value in changed.items() if key in ("bits", "group_size")}
    return replace(PORTABLE, linears=tuple(replace(x, **own) for x in PORTABLE.linears), **changed)


EXPERTS = replace(PORTABLE, linears=(linear("model.layers.0.mlp.experts.3.down_proj"),))
MIXED = replace(PORTABLE, linears=(*PORTABLE.linears[1:], replace(PORTABLE.linears[0], bits=8)))
NONE: dict[Target, dict[str, Level]] = {}

CASES: list[tuple[str, TargetFacts, dict[str, dict[str, Level]]]] = [
    (
        "8 bits",
        every(bits=8),
        {"exllamav2": {"four-bits-only": "error"}},
    ),
    (
        "3 bits",
        every(bits=3),
        {
            "vllm": {"marlin-bits": "error"},
            "sglang": {"marlin-bits": "error"},
            "exllamav2": {"four-bits-only": "error"},
        },
    ),
    (
        "asymmetric v2",
        replace(PORTABLE, sym=False, checkpoint_format="gptq_v2"),
        {"vllm": {"marlin-symmetric": "error"}, "sglang": {"marlin-symmetric": "error"}},
    ),
    (
        "asymmetric v1",
        replace(PORTABLE, sym=False),
        {
            "vllm": {"marlin-symmetric": "error"},
            "sglang": {"marlin-symmetric": "error"},
            "gptqmodel": {"wrapped-zeros": "warning"},
        },
    ),
    (
        "group 16",
        every(group_size=16),
        {"vllm": {"marlin-groups": "error"}, "sglang": {"marlin-groups": "error"}},
    ),
    (
        "group 96",
        replace(every(group_size=96), linears=(linear(in_features=4032, group_size=96),)),
        {
            "vllm": {"marlin-groups": "error"},
            "sglang": {"marlin-groups": "error"},
            "exllamav2": {"power-of-two-groups": "error"},
            "gptqmodel": {"gptqmodel-groups": "error"},
        },
    ),
    ("activation order", replace(PORTABLE, desc_act=True), {"vllm": {"activation-order": "error"}}),
    (
        "activation order, one group",
        replace(every(group_size=-1), desc_act=True),
        {},
    ),
    ("silent order", replace(PORTABLE, trivial_g_idx=False), {"vllm": {"activation-order": "error"}}),
    (
        "ragged group",
        replace(PORTABLE, linears=(linear(in_features=4000),)),
        {target: {"whole-groups": "error"} for target in TARGETS},
    ),
    (
        "half a word",
        replace(every(group_size=-1), linears=(linear(out_features=1022, group_size=-1),)),
        {target: {"whole-words": "error"} for target in TARGETS}
        | {"sglang": {"whole-words": "error", "fused-columns": "error"}},
    ),
    ("bfloat16", replace(PORTABLE, dtype="bfloat16"), {"exllamav2": {"float16-only": "warning"}}),
    (
        "float32",
        replace(PORTABLE, dtype="float32"),
        {
            "vllm": {"half-precision": "warning"},
            "sglang": {"half-precision": "warning"},
            "exllamav2": {"float16-only": "warning"},
        },
    ),
    (
        "bf16 scales",
        replace(PORTABLE, scale_dtype="bfloat16"),
        {"exllamav2": {"half-scales": "warning"}, "gptqmodel": {"half-scales": "warning"}},
    ),
    (
        "siblings differ",
        MIXED,
        {
            "vllm": {"fused-siblings": "error"},
            "sglang": {"fused-siblings": "error"},
            "transformers": {"no-overrides": "error"},
            "exllamav2": {"four-bits-only": "error"},
        },
    ),
    (
        "a sibling is dense",
        replace(
            PORTABLE,
            linears=PORTABLE.linears[1:],
            dense=("model.layers.0.self_attn.q_proj",),
            modules_listed=True,
        ),
        {
            "vllm": {"fused-siblings": "error"},
            "sglang": {"fused-siblings": "error"},
        },
    ),
    (
        "dense and not listed",
        replace(PORTABLE, dense=("model.layers.0.mixer.dt_proj",)),
        {"transformers": {"no-overrides": "error"}},
    ),
    (
        "two group sizes",
        replace(PORTABLE, linears=(linear(group_size=64), linear(name="a.o_proj"))),
        {
            "transformers": {"no-overrides": "error"},
            "exllamav2": {"one-setting": "error"},
        },
    ),
    ("quantized head", replace(PORTABLE, lm_head=True), {"transformers": {"no-quantized-head": "error"}}),
    ("experts", EXPERTS, {"transformers": {"no-experts": "error"}}),
    (
        "odd experts",
        replace(EXPERTS, linears=(linear("x.experts.0.down_proj", in_features=4096, out_features=1056),)),
        {
            "vllm": {"expert-sizes": "warning"},
            "sglang": {"expert-columns": "error"},
            "transformers": {"no-experts": "error"},
        },
    ),
    (
        "asymmetric experts",
        replace(
            EXPERTS,
            sym=False,
            checkpoint_format="gptq_v2",
            linears=tuple(replace(x, sym=False) for x in EXPERTS.linears),
        ),
        {
            "vllm": {"marlin-symmetric": "error"},
            "sglang": {"marlin-symmetric": "error"},
            "transformers": {"no-experts": "error"},
        },
    ),
    (
        "only quantize_config.json",
        replace(PORTABLE, in_config_json=False),
        {target: {"config-json": "error"} for target in TARGETS if target != "gptqmodel"},
    ),
]


@pytest.mark.parametrize(("facts", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_departures(facts: TargetFacts, expected: dict[str, dict[str, Level]]) -> None:
    assert {target: levels(target, facts) for target in TARGETS} == {
        target: expected.get(target, {}) for target in TARGETS
    }


def test_notes() -> None:
    assert [f.rule for f in check_target("transformers", PORTABLE)] == ["packages"]
    narrow = replace(PORTABLE, linears=(linear(out_features=1040),))
    assert [f.rule for f in check_target("vllm", narrow) if f.level == "note"] == ["cpu-kernel"]


def test_findings_name_their_linears() -> None:
    facts = replace(PORTABLE, linears=(linear(in_features=4000), linear("b", in_features=100)))
    finding = next(f for f in check_target("vllm", facts) if f.rule == "whole-groups")
    assert finding.modules == ("model.layers.0.mlp.down_proj", "b")
    assert finding.message.startswith("model.layers.0.mlp.down_proj (4000 x 1024) and 1 more: ")
    assert finding.hint


def test_an_unknown_target() -> None:
    with pytest.raises(ConfigError, match="allowed: vllm, sglang"):
        check_target("llama.cpp", PORTABLE)  # type: ignore[arg-type]
