"""`--tp N`: whether the shards of a checkpoint divide over N ranks, in vLLM and in SGLang."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.findings import Finding
from gptq_cli.model.facts import HeadCounts, Split
from gptq_cli.readers import Target
from gptq_cli.targets.check import check_target
from gptq_cli.targets.facts import Case, TargetFacts, TargetLinear


def linear(name: str, k: int, n: int, split: Split, group: int = 128) -> TargetLinear:
    return TargetLinear(name=name, in_features=k, out_features=n, bits=4, group_size=group, split=split)


def decoder(
    *, hidden: int, inner: int, heads: int, keys: int, head_dim: int = 128, group: int = 128, experts: int = 0
) -> TargetFacts:
    """A block of a llama, or one of a mixture of experts."""
    block = "model.layers.0"
    linears = [
        linear(f"{block}.self_attn.q_proj", hidden, heads * head_dim, "column", group),
        linear(f"{block}.self_attn.k_proj", hidden, keys * head_dim, "column", group),
        linear(f"{block}.self_attn.v_proj", hidden, keys * head_dim, "column", group),
        linear(f"{block}.self_attn.o_proj", heads * head_dim, hidden, "row", group),
    ]
    for mlp in [f"mlp.experts.{number}" for number in range(experts)] or ["mlp"]:
        linears += [
            linear(f"{block}.{mlp}.gate_proj", hidden, inner, "column", group),
            linear(f"{block}.{mlp}.up_proj", hidden, inner, "column", group),
            linear(f"{block}.{mlp}.down_proj", inner, hidden, "row", group),
        ]
    return TargetFacts(
        bits=4,
        group_size=group,
        sym=True,
        desc_act=False,
        checkpoint_format="gptq",
        dtype="bfloat16",
        linears=tuple(linears),
        heads=HeadCounts(heads, keys),
        hidden_size=hidden,
    )


def asked(target: Target, facts: TargetFacts, tp: int) -> list[Finding]:
    """What the rule says."""
    return [f for f in check_target(target, replace(facts, tp=tp)) if f.rule == "tensor-parallel"]


LLAMA = decoder(hidden=4096, inner=14336, heads=32, keys=8)


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_a_llama_divides(target: Target) -> None:
    assert asked(target, LLAMA, 1) == []
    (note,) = asked(target, LLAMA, 4)
    assert (note.level, note.message) == ("note", "divides over 4 ranks; 16 are the most that do")


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_groups_that_straddle_ranks(target: Target) -> None:
    """14336 / 32 = 448 inputs per rank are 3.5 groups of 128, and 7 of 64."""
    (error,) = asked(target, LLAMA, 32)
    assert error.level == "error"
    assert error.message == (
        "model.layers.0.mlp.down_proj (14336 x 4096): 448 inputs per rank do not divide into groups of 128; "
        "at most 16 ranks divide it"
    )
    assert error.hint == "quantize with --group-size 64, or use 16 ranks"
    smaller = decoder(hidden=4096, inner=14336, heads=32, keys=8, group=64)
    assert [f.level for f in asked(target, smaller, 32)] == ["note"]


def test_heads_that_do_not_divide() -> None:
    (heads, matrices) = asked("vllm", LLAMA, 3)
    assert heads.message.startswith("32 attention heads do not divide over 3 ranks (and 1 more); at most 16")
    assert heads.hint == "use 16 ranks"
    assert matrices.level == "error"


def test_key_value_heads_are_copied() -> None:
    """Qwen2.5-0.5B and 3B have 2 key-value heads: each goes to two of four ranks."""
    qwen = decoder(hidden=2048, inner=11008, heads=16, keys=2, group=64)
    assert [f.level for f in asked("vllm", qwen, 4)] == ["note"]
    assert [f.level for f in asked("sglang", qwen, 4)] == ["note"]
    (error, *_) = asked("vllm", decoder(hidden=1536, inner=6144, heads=12, keys=2), 3)
    assert "2 key-value heads neither divide over 3 ranks" in error.message


def test_one_matrix_of_queries_keys_and_values() -> None:
    facts = decoder(hidden=2048, inner=8192, heads=16, keys=2)
    together = linear("model.layers.0.attn.qkv_proj", 2048, 20 * 128, "column")
    facts = replace(facts, linears=(together, *facts.linears[3:]))
    assert [f.level for f in asked("vllm", facts, 8)] == ["note"]  # 20 heads / 8 would not divide


def test_fused_columns_per_rank_are_a_matter_of_sglang() -> None:
    """Four ranks of 2 query heads and copied keys of 24 columns each: 4 x 24 = 96."""
    facts = decoder(hidden=512, inner=1024, heads=8, keys=4, head_dim=24, group=32)
    facts = replace(facts, linears=tuple(x for x in facts.linears if "o_proj" not in x.name))
    assert [f.level for f in asked("vllm", facts, 4)] == ["note"]
    (error,) = asked("sglang", facts, 4)
    assert "qkv_proj has 96 columns per rank; SGLang takes multiples of 64" in error.message


def test_experts() -> None:
    """Qwen3-30B-A3B: 768 / 4 = 192 inputs per rank are 1.5 groups of 128: vLLM has a slower kernel for it."""
    moe = decoder(hidden=2048, inner=768, heads=32, keys=4, experts=8)
    assert [f.level for f in asked("vllm", moe, 4)] == ["note"]
    slower = [f.rule for f in check_target("vllm", replace(moe, tp=4)) if f.level == "warning"]
    assert slower == ["expert-sizes"]
    (error,) = asked("sglang", moe, 4)
    assert "192 inputs per rank do not divide into groups of 128" in error.message
    assert error.hint == "quantize with --group-size 64, or use 2 ranks"
    assert [
        f.level
        for f in asked("sglang", decoder(hidden=2048, inner=768, heads=32, keys=4, experts=8, group=64), 4)
    ] == ["note"]


def test_heads_of_linear_attention() -> None:
    facts = replace(LLAMA, heads=HeadCounts(32, 8, (("key heads of linear attention", 4),)))
    (error,) = asked("vllm", facts, 8)
    assert error.message.startswith("4 key heads of linear attention do not divide over 8 ranks; at most 4")


def test_what_can_never_be_divided_says_so() -> None:
    odd = replace(LLAMA, linears=(linear("model.layers.0.mlp.up_proj", 4096, 1000, "column"),))
    (error,) = asked("sglang", odd, 2)
    assert (error.message.endswith("no number of ranks divides it"), error.hint) == (
        True,
        "serve it on one device",
    )


def test_matrices() -> None:
    names = [matrix.name for matrix in Case("vllm", LLAMA).matrices]
    block = "model.layers.0"
    assert names == [
        f"{block}.self_attn.qkv_proj",
        f"{block}.self_attn.o_proj",
        f"{block}.mlp.gate_up_proj",
        f"{block}.mlp.down_proj",
    ]


def test_one_of_something_is_said_in_the_singular() -> None:
    facts = decoder(hidden=128, inner=128, heads=1, keys=1)
    (head, _) = asked("vllm", facts, 2)
    assert head.message.startswith("1 attention head does not divide over 2 ranks")
    facts = replace(facts, heads=HeadCounts(2, 2, (("key heads of linear attention", 1),)))
    (head, _) = asked("vllm", facts, 2)
    assert head.message.startswith("1 key head of linear attention does not divide over 2 ranks")
