"""What the readers of GPTQ checkpoints accept: one rule per demand, the targets that make it as topics.

A rule's docstring says what the reader does, and so why the rule exists. An *error* means that the reader
refuses the file or computes something else, a *warning* that it serves it in a slower or narrower way. The
rules come from the readers' sources as of mid-2026, and from running vLLM 0.32 on a CPU and Transformers 5.23
with Optimum and GPTQModel 7.6.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from gptq_cli.config import Target
from gptq_cli.rules import Remark, rule
from gptq_cli.wording import names_text

TARGETS: tuple[Target, ...] = get_args(Target)
MARLIN_GROUPS = (-1, 32, 64, 128)
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_EXPERT = re.compile(r"\.experts?\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetLinear:
    """One quantized linear, under its name in the files: K = in_features, N = out_features."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int

    @property
    def is_expert(self) -> bool:
        """Whether it is one of a mixture's experts, by its name."""
        return _EXPERT.search(self.name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What the rules need to know of a checkpoint, made or planned."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: str
    """"gptq" (v1) or "gptq_v2"."""
    dtype: str
    """Of the dense tensors: "bfloat16"."""
    linears: tuple[TargetLinear, ...]
    scale_dtype: str = "float16"
    lm_head: bool = False
    """The head is quantized."""
    changed: bool = False
    """`dynamic` gives some linears other settings."""
    left_dense: bool = False
    """`dynamic` leaves some linears of the blocks dense."""
    modules_listed: bool = False
    """`modules_in_block_to_quantize` is there."""
    trivial_g_idx: bool = True
    """Every g_idx is i // group_size; always so in our own files without desc_act."""
    in_config_json: bool = True
    """config.json holds the quantization dictionary, not only quantize_config.json."""


@dataclass(frozen=True, slots=True)
class Case:
    """One reader and one checkpoint."""

    target: Target
    facts: TargetFacts

    @property
    def bits(self) -> list[int]:
        """All bit widths, ascending."""
        return sorted({self.facts.bits, *(linear.bits for linear in self.facts.linears)})

    @property
    def groups(self) -> list[int]:
        """All group sizes, ascending."""
        return sorted({self.facts.group_size, *(linear.group_size for linear in self.facts.linears)})

    @property
    def experts(self) -> list[TargetLinear]:
        """The linears that are experts."""
        return [linear for linear in self.facts.linears if linear.is_expert]

    def remark(self, message: str, hint: str = "", linears: Sequence[TargetLinear] = ()) -> Remark:
        """A remark about this case; `linears` are named, the first of them in the message."""
        if linears:
            first = linears[0]
            shape = f"{first.name} ({first.in_features} x {first.out_features})"
            message = f"{names_text([shape, *linears[1:]], 1)}: {message}"
        return Remark(
            subject=self.target,
            message=message,
            hint=hint,
            modules=tuple(linear.name for linear in linears),
        )


@rule("error", topics=("vllm", "sglang", "transformers", "exllamav2"))
def config_json(case: Case) -> Iterator[Remark]:
    """All readers but GPTQModel read config.json alone."""
    if not case.facts.in_config_json:
        yield case.remark(
            "config.json holds no quantization_config, and no other file is read",
            "copy the content of quantize_config.json there",
        )


def _marlin(case: Case, otherwise: str) -> Iterator[Remark]:
    if not case.facts.sym:
        yield case.remark(f"asymmetric codes: {otherwise}", "quantize with --sym")
    bits = [bits for bits in case.bits if bits not in (4, 8)]
    if bits:
        yield case.remark(f"{bits[0]}-bit codes: {otherwise}", "quantize with --bits 4 or 8")
    groups = [group for group in case.groups if group not in MARLIN_GROUPS]
    if groups:
        message = f"group size {groups[0]} (Marlin takes -1, 32, 64, 128): {otherwise}"
        yield case.remark(message, "quantize with --group-size 128, 64 or 32")


@rule("error", topics=("vllm",))
def marlin_refuses(case: Case) -> Iterator[Remark]:
    """vLLM has Marlin kernels only: 4 and 8 bits, symmetric, groups of -1, 32, 64, 128."""
    yield from _marlin(case, "vLLM refuses it")


@rule("warning", topics=("sglang",))
def marlin_is_left(case: Case) -> Iterator[Remark]:
    """SGLang falls back to its plain kernel, which runs in float16."""
    yield from _marlin(case, "SGLang serves it with its plain kernel, in float16 only")


@rule("error", topics=("vllm",))
def activation_order(case: Case) -> Iterator[Remark]:
    """vLLM refuses desc_act with groups, and ignores g_idx without desc_act."""
    if case.facts.desc_act and case.facts.group_size != -1:
        yield case.remark(
            "activation order with groups (desc_act) is no longer supported by vLLM",
            "quantize with --no-desc-act; static order has its accuracy",
        )
    elif not case.facts.desc_act and not case.facts.trivial_g_idx:
        yield case.remark(
            "g_idx orders the columns though desc_act is false: vLLM ignores it and computes something else",
        )


@rule("error", topics=("exllamav2",))
def four_bits_only(case: Case) -> Iterator[Remark]:
    """ExLlamaV2's GPTQ kernel reads 4-bit codes only."""
    bits = [bits for bits in case.bits if bits != 4]
    if bits:
        yield case.remark(f"{bits[0]}-bit codes; allowed: 4", "quantize with --bits 4")


@rule("error", topics=("exllamav2",))
def power_of_two_groups(case: Case) -> Iterator[Remark]:
    """ExLlamaV2 finds the group of a column by shifting bits, so group sizes are powers of two."""
    odd = [group for group in case.groups if group != -1 and group & (group - 1)]
    if odd:
        yield case.remark(f"group size {odd[0]}; allowed: powers of two, -1")


@rule("error", topics=("exllamav2",))
def one_setting(case: Case) -> Iterator[Remark]:
    """ExLlamaV2 does not read `dynamic`, so all linears need the same group size."""
    if len(case.groups) > 1:
        yield case.remark("linears have different group sizes, and dynamic is not read")


@rule("error", topics=("gptqmodel",))
def gptqmodel_groups(case: Case) -> Iterator[Remark]:
    """GPTQModel checks the group size against a list."""
    odd = [group for group in case.groups if group not in GPTQMODEL_GROUPS]
    if odd:
        allowed = ", ".join(map(str, GPTQMODEL_GROUPS))
        yield case.remark(f"group size {odd[0]}; allowed: {allowed}")


@rule("error", topics=TARGETS)
def whole_words(case: Case) -> Iterator[Remark]:
    """Readers allocate K * bits / 32 and N * bits / 32 words, rounding down: a remainder is a wrong shape."""
    odd = [x for x in case.facts.linears if x.in_features * x.bits % 32 or x.out_features * x.bits % 32]
    if odd:
        message = "its codes or zeros do not fill whole 32-bit words"
        yield case.remark(message, "leave it dense, or use --bits 8", odd)


@rule("error", topics=TARGETS)
def whole_groups(case: Case) -> Iterator[Remark]:
    """Kernels work on whole groups: a shorter last group is refused or misread."""
    odd = [x for x in case.facts.linears if x.group_size != -1 and x.in_features % x.group_size]
    if odd:
        message = f"its inputs do not divide into groups of {odd[0].group_size}"
        yield case.remark(message, "use a --group-size that divides every input size, or -1", odd)


@rule("error", topics=("vllm", "sglang"))
def fused_siblings(case: Case) -> Iterator[Remark]:
    """q, k and v (gate and up) are loaded as one matrix: all quantized alike, or all dense."""
    by_name = {linear.name: linear for linear in case.facts.linears}
    odd: list[TargetLinear] = []
    for linear in case.facts.linears:
        owner, _, leaf = linear.name.rpartition(".")
        family = next((family for family in _FUSED if leaf in family), None)
        if family is None:
            continue
        siblings = [by_name.get(f"{owner}.{name}") for name in family]
        present = next(name for name, x in zip(family, siblings, strict=True) if x is not None)
        if leaf == present and len({(s.bits, s.group_size) if s else None for s in siblings}) > 1:
            odd.append(linear)
    if odd:
        yield case.remark(
            "it is fused with its siblings, which have other settings or are dense",
            "give q, k and v (gate and up) the same settings in dynamic",
            odd,
        )


@rule("warning", topics=("vllm",))
def fused_patterns(case: Case) -> Iterator[Remark]:
    """vLLM matches `dynamic` against the names of fused linears, so a pattern for one can be missed."""
    if case.facts.changed or case.facts.left_dense:
        yield case.remark(
            "dynamic is matched against fused names (qkv_proj): a pattern for q_proj alone can be missed",
        )


@rule("warning", topics=("vllm",))
def expert_sizes(case: Case) -> Iterator[Remark]:
    """Marlin takes experts whose sizes are multiples of 64 and of the group; others go to MoeWNA16."""
    odd = [
        x
        for x in case.experts
        if x.in_features % max(64, x.group_size) or x.out_features % max(64, x.group_size)
    ]
    if odd:
        yield case.remark("experts of this size go to the slower MoeWNA16", "", odd)


@rule("error", topics=("sglang",))
def experts_by_marlin_only(case: Case) -> Iterator[Remark]:
    """SGLang's plain kernel does not support experts."""
    facts = case.facts
    plain = not facts.sym or facts.bits not in (4, 8) or facts.group_size not in MARLIN_GROUPS
    if case.experts and plain:
        message = "quantized experts are served by Marlin only: 4 or 8 bits, symmetric, group -1, 32, 64, 128"
        yield case.remark(message, "", case.experts)


@rule("warning", topics=("vllm", "sglang"))
def half_precision(case: Case) -> Iterator[Remark]:
    """The kernels run in half precision, so a float32 model is computed in float16 or bfloat16."""
    if case.facts.dtype not in ("float16", "bfloat16"):
        message = f"the model's dtype is {case.facts.dtype}; its kernels run in float16 or bfloat16"
        yield case.remark(message, "start the server with --dtype float16")


@rule("note", topics=("vllm",))
def cpu_kernel(case: Case) -> Iterator[Remark]:
    """vLLM's CPU build takes fewer shapes and bit widths than its CUDA build."""
    odd = [x for x in case.facts.linears if x.in_features % 32 or x.out_features % 32 or x.bits != 4]
    if odd:
        yield case.remark("vLLM's CPU kernel takes 4-bit linears in multiples of 32 only", "", odd)


@rule("error", topics=("transformers",))
def no_overrides(case: Case) -> Iterator[Remark]:
    """Transformers ignores `dynamic`; dense linears are found by `modules_in_block_to_quantize` alone."""
    if case.facts.changed or (case.facts.left_dense and not case.facts.modules_listed):
        yield case.remark(
            "Transformers ignores dynamic and expects packed tensors of the same kind in every linear",
            "quantize all linears of a block alike, or read it with GPTQModel, vLLM or gptq load",
        )


@rule("error", topics=("transformers",))
def no_quantized_head(case: Case) -> Iterator[Remark]:
    """Transformers replaces the linears of blocks only, so a quantized head is not read."""
    if case.facts.lm_head:
        yield case.remark("a quantized lm_head is not read by Transformers")


@rule("error", topics=("transformers",))
def no_experts(case: Case) -> Iterator[Remark]:
    """Transformers 5 fuses experts into 3-D tensors, which cannot hold packed ones."""
    if case.experts:
        message = "Transformers 5 fuses experts into one tensor and has no place for packed ones"
        yield case.remark(message, "serve it with vLLM or GPTQModel", case.experts)


@rule("note", topics=("transformers",))
def packages(case: Case) -> Iterator[Remark]:
    """Transformers has no GPTQ kernels of its own; Optimum and GPTQModel bring them."""
    yield case.remark("needs optimum 1.24 or newer and gptqmodel 1.4.3 or newer beside it")


@rule("warning", topics=("gptqmodel",))
def wrapped_zeros(case: Case) -> Iterator[Remark]:
    """Asymmetric v1 stores zero - 1, which wraps for a zero of 0: adding 1 per word then carries over."""
    if not case.facts.sym and case.facts.checkpoint_format == "gptq":
        yield case.remark(
            "asymmetric codes in format v1: a zero of 0 wraps, and readers disagree about it",
            "write asymmetric codes as gptq_v2",
        )


@rule("warning", topics=("exllamav2", "gptqmodel"))
def half_scales(case: Case) -> Iterator[Remark]:
    """Scales are converted to float16, which rounds those that are stored in another type."""
    if case.facts.scale_dtype != "float16":
        message = f"scales are stored as {case.facts.scale_dtype}; they are converted to float16"
        yield case.remark(message)


@rule("warning", topics=("exllamav2",))
def float16_only(case: Case) -> Iterator[Remark]:
    """ExLlamaV2 runs in float16 whatever the file says."""
    if case.facts.dtype != "float16":
        message = f"the model's dtype is {case.facts.dtype}; ExLlamaV2 runs it in float16"
        yield case.remark(message)
