"""Settings by module, the head, and what stays dense by itself: what the rules say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.findings import Finding
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.planning.cases import Work
from gptq_cli.preflight.registry import check_quantize
from gptq_cli.readers import Target
from gptq_cli.results.kept import BY_MODULE, TOO_SMALL, KeptDense
from tests.preflight.shapes import llama

HEAD = LinearFact(name="lm_head", block="", in_features=1024, out_features=32000)


def found(
    rule: str, facts: ModelFacts | None = None, targets: tuple[Target, ...] = (), **fields: Any
) -> list[Finding]:
    work = Work(QuantizeConfig.of(**{"group_size": 128, **fields}), CalibrationConfig())
    report = check_quantize(facts or llama(blocks=2), work, targets=targets)
    return [finding for finding in report.findings if finding.rule == rule]


def without(facts: ModelFacts, end: str) -> ModelFacts:
    """`facts` with the linears of this end left dense by --module."""
    dense = tuple(x for x in facts.linears if x.name.endswith(end))
    return replace(
        facts,
        linears=tuple(x for x in facts.linears if x not in dense),
        by_module=dense,
        kept=(KeptDense(name=f"model.layers.*.{end}", reason=BY_MODULE, linears=len(dense), weights=1),),
        dense_linears=tuple(x.name for x in dense),
    )


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("model.layers.*.mlp.down=bits:8", "did you mean model.layers.*.mlp.down_proj"),
        ("model.layers.7.mlp.up_proj=dense", "did you mean model.layers.*.mlp.up_proj"),
        ("layers.*.mlp=bits:8", "model.layers.*.mlp"),
        ("q=bits:8", "linears here: model.layers.*.self_attn.q_proj"),
        ("lm_head=bits:8", "--quantize-head"),
    ],
)
def test_a_pattern_that_covers_nothing(text: str, hint: str) -> None:
    (finding,) = found("module-pattern", modules=text)
    assert (finding.level, finding.subject) == ("error", f"--module {text}")
    assert hint in finding.hint


def test_the_head_may_have_another_name() -> None:
    facts = replace(llama(), head=replace(HEAD, name="language_model.lm_head"))
    (finding,) = found("module-pattern", facts, modules="lm_head=bits:8", quantize_head=True)
    assert finding.hint == "here the output head is called language_model.lm_head"


def test_dense_may_name_what_is_dense_anyway() -> None:
    router = "model.layers.*.mlp.gate"  # a module with a matrix that is no linear, as in Qwen3-MoE
    facts = llama()
    facts = replace(facts, modules=(*facts.modules, "model.layers.0.mlp.gate"))
    assert not found("module-pattern", facts, modules=f"{router}=dense")
    (finding,) = found("module-pattern", facts, modules=f"{router}=bits:8")
    assert "is not a linear, and stays dense" in finding.message


def test_patterns_that_cover_something() -> None:
    rules = ["model.layers.0-1.mlp=bits:8", "model.layers.*.self_attn.*_proj=bits:8", "model=sym"]
    assert not found("module-pattern", modules=rules)
    assert not found("module-pattern", without(llama(), "mlp.up_proj"), modules="model.*.*.mlp.up_proj=dense")
    assert not found(
        "module-pattern", replace(llama(), head=HEAD), modules="lm_head=bits:4", quantize_head=True
    )


def test_a_setting_for_what_cannot_be_quantized() -> None:
    kept = KeptDense(name="model.layers.*.router", reason="router", linears=2, weights=8)
    facts = replace(llama(blocks=2), kept=(kept,), dense_linears=("model.layers.0.router",))
    (finding,) = found("module-pattern", facts, modules="model.layers.0.router=bits:8")
    assert finding.message == "what it covers cannot be quantized: router"
    assert not found("module-pattern", facts, modules="model.layers.*.router=dense")
    some = replace(kept, name="model.layers.0,2.router, model.other.3.router")
    facts = replace(facts, kept=(some,))
    (finding,) = found("module-pattern", facts, modules="model.layers.0.router=bits:8")
    assert finding.message == "what it covers cannot be quantized: router"


@pytest.mark.parametrize(
    ("targets", "level"), [((), "warning"), (("gptqmodel",), "warning"), (("vllm",), "error")]
)
def test_fused_siblings_that_differ(targets: tuple[Target, ...], level: str) -> None:
    (finding,) = found("siblings-alike", targets=targets, modules="model.layers.*.self_attn.v_proj=bits:8")
    assert finding.level == level
    assert finding.message.startswith(
        "model.layers.*.self_attn.q_proj, model.layers.*.self_attn.k_proj, model"
    )
    assert len(finding.modules) == 6


def test_a_dense_sibling_differs_too() -> None:
    facts = without(llama(blocks=2), "mlp.up_proj")
    (finding,) = found("siblings-alike", facts, modules="model.layers.*.mlp.up_proj=dense")
    assert "mlp.gate_proj" in finding.message


def test_siblings_that_agree() -> None:
    rules = ["model.layers.*.self_attn=bits:8", "model.layers.*.self_attn.o_proj=bits:4,group:64"]
    assert not found("siblings-alike", modules=rules)
    facts = without(without(llama(blocks=2), "mlp.up_proj"), "mlp.gate_proj")
    assert not found("siblings-alike", facts, modules="model.layers.*.mlp.*=bits:8")


def test_experts_of_a_block_are_one_matrix() -> None:
    experts = tuple(
        LinearFact(
            name=f"b.0.experts.{i}.{name}",
            block="b.0",
            in_features=128,
            out_features=128,
            stage=i,
            routed=True,
        )
        for i in range(2)
        for name in ("up", "down")
    )
    facts = replace(llama(blocks=1), blocks=("b.0",), linears=experts)
    assert found("siblings-alike", facts, modules="b.0.experts.1=bits:8")
    assert not found("siblings-alike", facts, modules="b.0.experts=bits:8")


def test_groups_and_bits_of_modules_are_checked() -> None:
    down = "model.layers.*.mlp.down_proj"
    (finding,) = found("group-divides", modules=f"{down}=group:96")
    assert (finding.subject, len(finding.modules)) == ("--module group:96", 2)
    assert finding.hint == "128, 64, 32, 16, 8 divide them; -1: one group per row"
    assert not found("group-divides", modules=f"{down}=group:64")
    (finding,) = found("group-too-large", modules=f"{down}=group:8192")
    assert "8192 is larger than the input columns 4096 of 2 linears" in finding.message
    facts = llama(blocks=2, inner=4100)
    (rows,) = found("packing-columns", facts, bits=4, modules="model.layers.*.mlp=bits:2", group_size=-1)
    assert (rows.subject, len(rows.modules)) == ("--module bits:2", 4)


def test_a_hint_names_what_no_bit_width_packs() -> None:
    facts = llama(blocks=2, inner=4097)
    (finding,) = found("packing-rows", facts, group_size=-1)
    assert finding.hint == "no bit width packs them: --module 'model.layers.*.mlp.down_proj=dense'"


def test_a_head_that_is_not_there() -> None:
    (finding,) = found("quantized-head", quantize_head=True)
    assert finding.level == "error"
    assert not found("quantized-head", replace(llama(), head=HEAD), quantize_head=True)


def test_a_tied_head_is_announced() -> None:
    facts = replace(llama(tied=True), head=HEAD)
    (finding,) = found("head-untied", facts, quantize_head=True)
    assert finding.level == "note"
    assert finding.size_bytes > 32000 * 1024
    assert not found("head-untied", replace(llama(), head=HEAD), quantize_head=True)


def test_the_size_of_the_checkpoint_counts_the_head_once() -> None:
    from gptq_cli.planning.memory import packed_bytes, quantized_bytes

    config = QuantizeConfig(group_size=128, quantize_head=True)
    weight = 32000 * 1024 * 2
    codes = packed_bytes(HEAD, config.for_model((), "lm_head"))
    assert codes > packed_bytes(HEAD, config)
    for tied in (False, True):
        facts = llama(tied=tied)
        with_head = quantized_bytes(replace(facts, head=HEAD), config)
        assert with_head - quantized_bytes(facts, config) == codes - (0 if tied else weight)


@pytest.mark.parametrize(("weights", "level"), [(100, "note"), (10**8, "warning")])
def test_small_linears_are_named(weights: int, level: str) -> None:
    kept = (
        KeptDense(name="model.layers.*.altup.x", reason=TOO_SMALL, linears=2, weights=weights),
        KeptDense(name="model.layers.*.router", reason="router", linears=2, weights=weights),
    )
    (finding,) = found("small-linears", replace(llama(), kept=kept))
    assert (finding.level, finding.subject) == (level, "model.layers.*.altup.x")
    assert finding.message.startswith("2 linears stay dense: too small to be packed with")
    (one,) = found("small-linears", replace(llama(), kept=(replace(kept[0], linears=1),)))
    assert one.message.startswith("1 linear stays dense:")


def test_targets_are_asked_about_settings_by_module_and_the_head() -> None:
    (finding,) = found("target", targets=("transformers",), modules="model.layers.*.mlp.down_proj=bits:8")
    assert (finding.level, finding.hint) == ("error", "without --module")
    headed = replace(llama(), head=HEAD)
    (finding,) = found("target", headed, targets=("transformers",), quantize_head=True)
    assert (finding.level, finding.hint) == ("error", "--no-quantize-head")
    assert not [
        f for f in found("target", headed, targets=("vllm",), quantize_head=True) if f.level == "error"
    ]
