"""What each reader accepts: the portable default passes everywhere, every departure is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptq_cli.errors import ConfigError
from gptq_cli.findings import Level
from gptq_cli.readers import Target
from gptq_cli.targets.check import check_target
from gptq_cli.targets.facts import TARGETS, TargetFacts, TargetLinear


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
        "one weight at several places",
        replace(PORTABLE, shared=("model.layers.6.shared_transf.self_attn.q_proj",)),
        {target: {"stored-once": "warning"} for target in TARGETS},
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


def block(*parts: tuple[str, int, int], **changed: Any) -> TargetFacts:
    """A checkpoint whose block has linears of (name, K, N)."""
    linears = tuple(linear(f"model.layers.0.{name}", in_features=k, out_features=n) for name, k, n in parts)
    return replace(PORTABLE, linears=linears, **changed)


def test_vllm_pads_what_sglang_refuses() -> None:
    facts = block(("mlp.down_proj", 128 * 33, 96), ("mixer.x_proj", 128, 48))
    assert levels("vllm", facts) == {}
    (error,) = [f for f in check_target("sglang", facts) if f.level == "error"]
    assert error.rule == "fused-columns"
    assert "SGLang loads it with 96 columns; allowed: multiples of 64" in error.message


def test_what_counts_for_sglang_is_the_fused_matrix() -> None:
    """24 value heads: in_proj_ba has 48 columns, q, k and v together 320."""
    fused = block(
        ("self_attn.q_proj", 256, 256), ("self_attn.k_proj", 256, 32), ("self_attn.v_proj", 256, 32)
    )
    assert levels("sglang", fused) == {}
    gates = block(("linear_attn.in_proj_a", 256, 24), ("linear_attn.in_proj_b", 256, 24))
    (error,) = [f for f in check_target("sglang", gates) if f.level == "error"]
    assert "SGLang loads it as in_proj_ba with 48 columns" in error.message
    assert error.modules == tuple(f"model.layers.0.linear_attn.in_proj_{x}" for x in "ba")
    assert levels("vllm", gates) == {}
    assert levels("gptqmodel", gates) == {"gates-stay-dense": "error"}
    head = replace(PORTABLE, linears=(linear("lm_head", out_features=1000),), lm_head=True)
    assert levels("sglang", head) == {}  # it pads the vocabulary


@pytest.mark.parametrize(
    ("name", "sibling"),
    [("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"), ("gate_proj", "up_proj"), ("w1", "w3")],
)
def test_every_fused_family_agrees(name: str, sibling: str) -> None:
    facts = block((f"x.{name}", 128, 128), dense=(f"model.layers.0.x.{sibling}",), modules_listed=True)
    assert levels("vllm", facts) == {"fused-siblings": "error"}
    assert levels("vllm", replace(facts, dense=())) == {}
    assert levels("vllm", replace(facts, dense=(f"model.layers.1.x.{sibling}",))) == {}


def test_gptqmodel_finds_experts_by_the_names_that_it_gives_them() -> None:
    def experts(*names: str, **changed: Any) -> TargetFacts:
        found = (linear(f"model.layers.0.mlp.experts.7.{name}", **changed) for name in names)
        return replace(PORTABLE, linears=tuple(found))

    usual = ("gate_proj", "up_proj", "down_proj")
    assert levels("gptqmodel", experts(*usual)) == {}
    for refused in (
        experts("w1", "w3", "w2"),
        experts("gate_proj", source_name="model.layers.0.block_sparse_moe.experts.7.w1"),
        experts(*usual, interleaved=True),
    ):
        assert levels("gptqmodel", refused) == {"defused-experts": "error"}
        assert "defused-experts" not in levels("vllm", refused)
    (error,) = check_target("gptqmodel", experts("w1", "w3", "w2"))
    assert "experts are called w1, w3, w2 in the files; GPTQModel finds gate_proj, up_proj" in error.message
    (error,) = check_target("gptqmodel", experts("3", "4"))
    assert "experts are called N in the files" in error.message
    assert levels("gptqmodel", replace(PORTABLE, linears=(linear("model.layers.0.feed_forward.w1"),))) == {}


def test_activation_order_of_one_linear() -> None:
    own = replace(PORTABLE, linears=(linear(desc_act=True),))
    assert levels("vllm", own) == {"activation-order": "error"}
    assert levels("vllm", replace(PORTABLE, linears=(linear(desc_act=True, group_size=-1),))) == {}
    assert levels("sglang", replace(PORTABLE, desc_act=True, linears=(linear(desc_act=True),))) == {}


def test_experts_of_one_block_agree() -> None:
    names = [f"model.layers.{b}.mlp.experts.{e}.up_proj" for b in (0, 1) for e in (0, 1)]
    alike = replace(PORTABLE, linears=tuple(linear(name) for name in names))
    assert levels("vllm", alike) == {}
    one = (linear(names[0], bits=8), *alike.linears[1:])
    assert levels("vllm", replace(alike, linears=one)) == {"equal-experts": "error"}
    assert levels("vllm", replace(alike, linears=alike.linears[1:], dense=names[:1])) == {
        "equal-experts": "error"
    }
    all_of_one_block = tuple(linear(name, bits=8 if ".0.mlp" in name else 4) for name in names)
    assert levels("vllm", replace(alike, linears=all_of_one_block)) == {}
    assert levels("sglang", replace(alike, linears=all_of_one_block)) == {"experts-in-dynamic": "error"}


def test_sglang_expects_packed_experts() -> None:
    facts = replace(PORTABLE, dense_experts=("model.layers.0.mlp.experts.gate_up_proj",))
    assert levels("sglang", facts) == {"experts-in-dynamic": "error"}
    assert levels("vllm", facts) == {}


def test_sizes_of_experts_in_vllm() -> None:
    """hidden % 128 and inner % group; the inner size itself is padded."""

    def moe(hidden: int, inner: int, group: int = 128) -> TargetFacts:
        experts = [
            linear("model.layers.0.mlp.experts.0.gate_proj", in_features=hidden, out_features=inner),
            linear("model.layers.0.mlp.experts.0.down_proj", in_features=inner, out_features=hidden),
        ]
        fitting = tuple(replace(x, group_size=group) for x in experts)
        return replace(PORTABLE, group_size=group, linears=fitting, hidden_size=hidden)

    assert levels("vllm", moe(2048, 768)) == {}
    assert levels("vllm", moe(2048, 96, group=32)) == {}
    assert levels("vllm", moe(2048 + 64, 768, group=64)) == {"expert-sizes": "warning"}


def test_notes() -> None:
    assert [f.rule for f in check_target("transformers", PORTABLE)] == ["packages"]
    narrow = replace(PORTABLE, linears=(linear(out_features=1040),))
    assert [f.rule for f in check_target("vllm", narrow) if f.level == "note"] == ["cpu-kernel"]
    fused = block(("self_attn.q_proj", 128, 48), ("self_attn.k_proj", 128, 24), ("self_attn.v_proj", 128, 24))
    assert check_target("vllm", fused) == ()  # 96 columns together
    assert [f.rule for f in check_target("sglang", PORTABLE)] == ["compute-capability"]
    assert "optimum 2.3 or newer and gptqmodel 7.0" in check_target("transformers", PORTABLE)[0].message


@pytest.mark.parametrize("target", TARGETS)
def test_every_error_says_what_to_do(target: Target) -> None:
    """Of all departures above, for each reader."""
    for _, facts, _ in CASES:
        assert all(f.hint for f in check_target(target, facts) if f.level == "error")


def test_findings_name_their_linears() -> None:
    facts = replace(PORTABLE, linears=(linear(in_features=4000), linear("b", in_features=100)))
    finding = next(f for f in check_target("vllm", facts) if f.rule == "whole-groups")
    assert finding.modules == ("model.layers.0.mlp.down_proj", "b")
    assert finding.message.startswith("model.layers.0.mlp.down_proj (4000 x 1024) and 1 more: ")
    assert finding.hint


def test_an_unknown_target() -> None:
    with pytest.raises(ConfigError, match="allowed: vllm, sglang"):
        check_target("llama.cpp", PORTABLE)  # type: ignore[arg-type]
