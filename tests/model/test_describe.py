"""What the plan is told about stages before any expert has seen a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from gptq_cli.config import ModelRef
from gptq_cli.model.describe import model_facts, stage_numbers
from gptq_cli.model.find import find_model
from gptq_cli.model.flow import Flow
from gptq_cli.model.skeleton import LinearInfo, open_skeleton
from gptq_cli.model.trace import Trace


def info(name: str, columns: int) -> LinearInfo:
    return LinearInfo(
        name=f"layers.0.{name}",
        block="layers.0",
        source_key=f"layers.0.{name}.weight",
        in_features=columns,
        out_features=8,
        bias=False,
        transposed=False,
    )


UNCAPPED = bool(Gemma2PreTrainedModel._supports_sdpa)
"""Older versions of Transformers give Gemma 2 to torch's attention, which has no cap on scores."""


LINEARS = (
    info("q", 16),
    info("k", 16),
    *(info(f"experts.{i}.{name}", k) for i in range(2) for name, k in (("w1", 16), ("w2", 32), ("w3", 16))),
)


def traced(*, problem: str = "") -> Trace:
    return Trace(
        order=(),
        stages=(("layers.0.q", "layers.0.k", "layers.0.router"),),
        idle=frozenset(x.name for x in LINEARS[2:]),
        read_not_called=frozenset(),
        flow=Flow(shapes={}),
        problem=problem,
    )


def test_experts_that_nothing_was_routed_to_share_a_stage_by_parent_and_columns() -> None:
    numbers = stage_numbers(traced(), LINEARS)
    assert {name.removeprefix("layers.0."): number for name, number in numbers.items()} == {
        "q": 0, "k": 0,
        "experts.0.w1": 1, "experts.0.w3": 1, "experts.0.w2": 2,
        "experts.1.w1": 3, "experts.1.w3": 3, "experts.1.w2": 4,
    }  # fmt: skip


def test_without_a_complete_trace_all_are_taken_like_this() -> None:
    numbers = stage_numbers(traced(problem="stopped"), LINEARS)
    assert numbers["layers.0.q"] == numbers["layers.0.k"] != numbers["layers.0.experts.0.w1"]
    assert numbers["layers.0.experts.0.w1"] == numbers["layers.0.experts.0.w3"]
    assert len(set(numbers.values())) == 5


@pytest.mark.parametrize(
    ("name", "heads", "kept"),
    [
        ("llama", 0, 0),
        ("gpt2", 0, 0),
        pytest.param(
            "gemma2", 4, 2, marks=pytest.mark.skipif(UNCAPPED, reason="Transformers leaves out the cap")
        ),
        ("bloom", 4, 4),
    ],
)
def test_scores_are_tensors_where_torchs_attention_cannot_serve(
    name: str, heads: int, kept: int, tiny: Callable[..., Path]
) -> None:
    ref = ModelRef(model=str(tiny(name)))
    facts = model_facts(open_skeleton(find_model(ref), ref))
    assert (facts.score_heads, facts.scores_kept) == (heads, kept)
