"""Readers asked before the work: a named one that would be lost is an error, with the smallest way out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.findings import Finding
from gptq_cli.model.facts import HeadCounts, ModelFacts
from gptq_cli.model.source import SourceProblem
from gptq_cli.planning.cases import Work
from gptq_cli.preflight.registry import check_quantize
from gptq_cli.readers import Target
from tests.preflight.shapes import llama

FACTS = llama(blocks=2, hidden=576, inner=1536, vocab=1000)


def found(*targets: Target, facts: ModelFacts = FACTS, tp: int = 1, **fields: Any) -> list[Finding]:
    """What is said about readers."""
    work = Work(QuantizeConfig(**{"group_size": 64} | fields), CalibrationConfig(samples=32, seq_len=512))
    report = check_quantize(facts, work, targets=targets, tp=tp)
    return [finding for finding in report.findings if finding.rule in ("target", "readers-lost")]


def test_nothing_to_say() -> None:
    assert found("vllm", "sglang", "transformers", "gptqmodel") == []


@pytest.mark.parametrize(
    ("fields", "hint", "change"),
    [
        ({"bits": 3}, "--bits 4", {"bits": 4}),
        ({"sym": False}, "--sym", {"sym": True}),
        ({"group_size": 16}, "--group-size 64", {"group_size": 64}),
        ({"desc_act": True, "sym": False}, "--no-desc-act --sym", {"desc_act": False, "sym": True}),
        ({"bits": 2, "sym": False}, "--sym --bits 4", {"sym": True, "bits": 4}),
    ],
)
def test_the_hint_is_the_smallest_change(fields: dict[str, Any], hint: str, change: dict[str, Any]) -> None:
    errors = [finding for finding in found("vllm", **fields) if finding.level == "error"]
    assert [(error.rule, error.subject, error.hint) for error in errors] == [
        ("target", "--target vllm", hint)
    ]
    assert [f for f in found("vllm", **(fields | change)) if f.rule == "target"] == []


def test_the_hint_serves_every_named_reader() -> None:
    """8 bits would do for vLLM; ExLlamaV2 wants 4."""
    errors = [f for f in found("vllm", "exllamav2", bits=3) if f.level == "error"]
    assert [(error.subject, error.hint) for error in errors] == [
        ("--target vllm", "--bits 4"),
        ("--target exllamav2", "--bits 4"),
    ]
    (alone,) = [f for f in found("exllamav2", bits=8) if f.level == "error"]
    assert alone.hint == "--bits 4"


def test_all_that_a_reader_minds_is_one_finding() -> None:
    (error,) = found("vllm", bits=3, sym=False, facts=FACTS)[:1]
    assert error.message == "3-bit codes (allowed: 4, 8); asymmetric codes (allowed: symmetric)"


def test_a_reader_that_cannot_be_served_at_all_says_so() -> None:
    odd = llama(blocks=1, hidden=6, inner=10, vocab=100)
    (error,) = [f for f in found("vllm", facts=odd, group_size=-1) if f.level == "error"]
    assert error.hint == "no setting makes vllm take this model: leave --target vllm out"


def test_what_is_narrower_is_a_warning() -> None:
    (warning,) = found("exllamav2")
    assert (warning.level, warning.subject) == ("warning", "--target exllamav2")
    assert "runs it in float16" in warning.message


def test_readers_that_nobody_named_are_a_warning() -> None:
    findings = found("gptqmodel", bits=3)
    assert {finding.level for finding in findings} == {"warning"}
    assert {name for f in findings for name in f.subject.split(", ")} == {"vllm", "sglang", "exllamav2"}
    assert found("vllm", bits=3)[0].level == "error"


def test_tensor_parallelism() -> None:
    """576 / 4 = 144 inputs per rank are not whole groups of 64; of 16 they would be, which no server has."""
    facts = replace(
        FACTS,
        heads=HeadCounts(8, 4),
        linears=tuple(
            replace(x, split="row" if x.name.endswith(("o_proj", "down_proj")) else "column")
            for x in FACTS.linears
        ),
    )
    assert [f for f in found("vllm", facts=facts) if f.rule == "target"] == []
    (error,) = [f for f in found("vllm", facts=facts, tp=4) if f.rule == "target"]
    assert (error.level, error.subject) == ("error", "--target vllm")
    assert "o_proj (576 x 576)" in error.message
    assert "144 inputs per rank do not divide into groups of 64" in error.message
    assert error.hint == "--group-size -1"
    (error,) = [
        f for f in found("vllm", facts=replace(facts, heads=HeadCounts(3, 3)), tp=4) if f.level == "error"
    ]
    assert error.hint == "--tp 3"
    notes = [f for f in found("vllm", facts=facts, group_size=-1, tp=4) if f.rule == "target"]
    assert [(f.level, f.message) for f in notes] == [("note", "divides over 4 ranks; 8 are the most that do")]


def test_dense_linears_are_told_to_readers() -> None:
    facts = replace(FACTS, dense_linears=("model.layers.0.self_attn.v_proj",), listed=True)
    facts = replace(facts, linears=tuple(x for x in facts.linears if x.name not in facts.dense_linears))
    (error, *_) = found("sglang", facts=facts)
    assert (error.level, "fused with its siblings" in error.message) == ("error", True)


def test_a_reader_that_cannot_be_served_beside_one_that_can() -> None:
    facts = llama(blocks=1, hidden=96, inner=160, vocab=100)
    errors = [f for f in found("vllm", "sglang", facts=facts, group_size=32) if f.level == "error"]
    assert [(f.subject, f.hint) for f in errors] == [
        ("--target sglang", "no setting makes sglang take this model: name --target vllm alone")
    ]


@pytest.mark.parametrize("targets", [(), ("vllm",)])
def test_nothing_is_said_of_a_result_that_cannot_be(targets: tuple[Target, ...]) -> None:
    """What refuses the model is said by another rule; no setting of a reader's would help."""
    work = Work(QuantizeConfig(group_size=16), CalibrationConfig(samples=32, seq_len=512))
    missing = SourceProblem("missing-weight", "model.layers.1.mlp.up_proj.weight", "no tensor in the files")
    dense = replace(FACTS, linears=(), by_module=FACTS.linears)
    for facts, problems in (
        (FACTS, (missing,)),
        (replace(FACTS, already_quantized="gptq"), ()),
        (dense, ()),
    ):
        report = check_quantize(facts, work, problems=problems, targets=targets)
        assert not report.ok
        assert not [f for f in report.findings if f.rule in ("target", "readers-lost")]
    left_out = SourceProblem("link-left-out", "LICENSE", "leads out of the directory")
    assert "target" in {
        f.rule for f in check_quantize(FACTS, work, problems=(left_out,), targets=("vllm",)).findings
    }
