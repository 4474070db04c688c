"""Rules about SGLang 0.5.23, which has Marlin kernels only, on CUDA devices of capability 8.0 or newer.

Of the config it reads `dynamic` and `lm_head`: it does not look which tensors are packed.
"""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.rules import Remark, rule
from gptq_cli.targets.facts import Case
from gptq_cli.wording import names_text, number_of

MIN_COLUMNS = 64
"""Marlin's tile: the columns of a matrix on one rank are a multiple of it."""


@rule("error", topics=("sglang",))
def fused_columns(case: Case) -> Iterator[Remark]:
    """SGLang repacks each matrix for Marlin, whose columns must be a multiple of 64; it pads none.

    What counts is N of the fused matrix on one rank: q, k and v together, gate and up, in_proj_qkv and
    in_proj_z, in_proj_b and in_proj_a.
    """
    odd = [m for m in case.matrices if m.out_features % MIN_COLUMNS]
    if odd:
        first = odd[0]
        what = f" as {first.name.rpartition('.')[2]}" if len(first.linears) > 1 else ""
        yield case.remark(
            f"SGLang loads it{what} with {number_of(first.out_features, 'column')}; "
            f"allowed: multiples of {MIN_COLUMNS}",
            "leave the parts of this matrix dense",
            [linear for matrix in odd for linear in matrix.linears],
        )


@rule("error", topics=("sglang",))
def expert_columns(case: Case) -> Iterator[Remark]:
    """SGLang repacks experts for Marlin: hidden and inner sizes are multiples of 64 on every rank."""
    odd = [x for x in case.experts if x.in_features % MIN_COLUMNS or x.out_features % MIN_COLUMNS]
    if odd:
        message = f"SGLang takes experts whose sizes are multiples of {MIN_COLUMNS}"
        yield case.remark(message, "leave the experts dense, and serve the model with vLLM", odd)


@rule("error", topics=("sglang",))
def experts_in_dynamic(case: Case) -> Iterator[Remark]:
    """SGLang does not ask `dynamic` about experts: they are all packed, in the settings of the checkpoint."""
    facts = case.facts
    base = (facts.bits, facts.group_size, facts.sym, facts.desc_act)
    own = [x for x in case.experts if x.settings != base]
    if own:
        message = "experts have settings of their own, and SGLang reads them in those of the checkpoint"
        yield case.remark(message, "give all linears the settings of the experts", own)
    left = [*facts.dense_experts, *(name for name in facts.dense if ".experts." in name)]
    if left:
        message = f"{names_text(left, 1)}: these experts are dense, and SGLang expects packed ones"
        yield case.remark(message, "serve it with vLLM, or quantize the experts, too")


@rule("note", topics=("sglang",))
def compute_capability(case: Case) -> Iterator[Remark]:
    """Marlin needs compute capability 8.0; SGLang has no other GPTQ kernel on CUDA."""
    yield case.remark("needs a CUDA device of compute capability 8.0 or newer (Ampere)")
