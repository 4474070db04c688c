"""Rules about the servers, vLLM and SGLang: both run GPTQ on Marlin kernels and fuse linears."""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.rules import Remark, rule
from gptq_cli.targets.facts import Case, TargetLinear

MARLIN_GROUPS = (-1, 32, 64, 128)


@rule("error", topics=("vllm", "sglang"))
def marlin_bits(case: Case) -> Iterator[Remark]:
    """Marlin kernels read 4 and 8 bits, in every linear.

    Both servers refuse other widths when they read the config. SGLang removed its plain kernel, which read 2
    and 3 bits; vLLM has another way, `--quantization humming`, which is not looked at here.
    """
    odd = [bits for bits in case.bits if bits not in (4, 8)]
    if odd:
        yield case.remark(f"{odd[0]}-bit codes (allowed: 4, 8)", "quantize with --bits 4 or 8")


@rule("error", topics=("vllm", "sglang"))
def marlin_symmetric(case: Case) -> Iterator[Remark]:
    """Marlin kernels for GPTQ read symmetric codes, and `qzeros` are ignored.

    SGLang took asymmetric ones with its plain kernel, which is gone since 0.5.23.
    """
    if case.asymmetric:
        yield case.remark("asymmetric codes (allowed: symmetric)", "quantize with --sym")


@rule("error", topics=("vllm", "sglang"))
def marlin_groups(case: Case) -> Iterator[Remark]:
    """Marlin kernels have group sizes of -1, 32, 64 and 128."""
    odd = [group for group in case.groups if group not in MARLIN_GROUPS]
    if odd:
        allowed = ", ".join(map(str, MARLIN_GROUPS))
        message = f"group size {odd[0]} (allowed: {allowed})"
        yield case.remark(message, "quantize with --group-size 128, 64 or 32")


@rule("error", topics=("vllm", "sglang"))
def fused_siblings(case: Case) -> Iterator[Remark]:
    """Linears that a server loads as one matrix are all quantized alike, or all dense.

    These are q, k and v; gate and up; and of Gated DeltaNet in_proj_qkv and in_proj_z, in_proj_b and
    in_proj_a. vLLM stops with an error, SGLang looks up the name of the matrix alone and then finds other
    tensors than it expects.
    """
    odd: list[TargetLinear] = []
    for matrix in case.matrices:
        if matrix.dense or len({linear.settings for linear in matrix.linears}) > 1:
            odd.append(matrix.linears[0])
    if odd:
        yield case.remark(
            "it is fused with its siblings, which have other settings or are dense",
            "give all parts of a fused matrix the same settings, or leave all of them dense",
            odd,
        )


@rule("error", topics=("vllm", "sglang"))
def equal_experts(case: Case) -> Iterator[Remark]:
    """The experts of a block are one tensor, so they are all quantized alike, or all dense."""
    blocks: dict[str, list[TargetLinear]] = {}
    for expert in case.experts:
        blocks.setdefault(_block(expert.name), []).append(expert)
    dense = {_block(name) for name in case.facts.dense if ".experts." in name}
    odd = [
        experts[0]
        for block, experts in blocks.items()
        if block in dense or len({expert.settings for expert in experts}) > 1
    ]
    if odd:
        message = "other experts of its block have other settings or are dense"
        yield case.remark(message, "give all experts of a block the same settings", odd)


def _block(name: str) -> str:
    return name.partition(".expert")[0]


@rule("warning", topics=("vllm", "sglang"))
def half_precision(case: Case) -> Iterator[Remark]:
    """The kernels run in half precision, so a float32 model is computed in float16 or bfloat16."""
    if case.facts.dtype not in ("float16", "bfloat16"):
        message = f"the model's dtype is {case.facts.dtype}; its kernels run in float16 or bfloat16"
        yield case.remark(message, "start the server with --dtype float16")
