"""Rules about vLLM 0.33: what it refuses, and what it serves more slowly or on a GPU alone.

It pads what Marlin does not take, so the sizes of linears are free, apart from whole groups per rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.rules import Remark, rule
from gptq_cli.targets.facts import Case


@rule("error", topics=("vllm",))
def activation_order(case: Case) -> Iterator[Remark]:
    """vLLM refuses desc_act with groups, and drops g_idx when it reads a file.

    This holds for settings in `dynamic`, too. With one group per row the order means nothing, and is taken.
    """
    order = [x for x in case.facts.linears if x.desc_act and x.group_size != -1]
    if order or (case.facts.desc_act and case.facts.group_size != -1):
        yield case.remark(
            "activation order with groups (desc_act) is no longer supported by vLLM",
            "quantize with --no-desc-act; static order has its accuracy",
        )
    elif not case.facts.desc_act and not case.facts.trivial_g_idx:
        yield case.remark(
            "g_idx orders the columns though desc_act is false: vLLM drops it and computes something else",
            "quantize again with --no-desc-act",
        )


@rule("warning", topics=("vllm",))
def expert_sizes(case: Case) -> Iterator[Remark]:
    """Marlin takes experts with hidden % 128 = 0 and whole groups on every rank; others go to MoeWNA16."""
    tp = case.facts.tp
    odd = []
    for x in case.experts:
        down = x.split == "row" or x.out_features == case.facts.hidden_size != x.in_features
        hidden, inner = (x.out_features, x.in_features) if down else (x.in_features, x.out_features)
        group = 1 if x.group_size == -1 else x.group_size
        if hidden % 128 or inner // tp % group:
            odd.append(x)
    if odd:
        message = "experts of this size go to the slower MoeWNA16"
        yield case.remark(message, "use a --group-size that divides the inner size of an expert", odd)


@rule("note", topics=("vllm",))
def cpu_kernel(case: Case) -> Iterator[Remark]:
    """vLLM's CPU build takes 4 bits only, and matrices whose K and N per rank are multiples of 32.

    N is that of the fused matrix: q, k and v together. Its wheel for x86 needs AVX-512 to run GPTQ.
    """
    odd = [
        matrix.linears[0]
        for matrix in case.matrices
        if any(x.in_features % 32 or x.bits != 4 for x in matrix.linears) or matrix.out_features % 32
    ]
    odd += [x for x in case.experts if x.in_features % 32 or x.out_features % 32 or x.bits != 4]
    if odd:
        message = "vLLM's CPU kernel takes 4-bit matrices in multiples of 32 only (and AVX-512 on x86)"
        yield case.remark(message, "", odd)
