"""What the readers of GPTQ checkpoints accept: one function a rule, a case -> findings.

A rule's docstring says what the reader does, and so why the rule exists. Rule ids begin with `target-`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gptq_cli.config import Target
from gptq_cli.findings import Finding, Level
from gptq_cli.wording import names_text

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

    def say(
        self,
        rule: str,
        level: Level,
        message: str,
        hint: str = "",
        linears: Sequence[TargetLinear] = (),
    ) -> Finding:
        """A finding about this case; `linears` are named, the first of them in the message."""
        if linears:
            first = linears[0]
            shape = f"{first.name} ({first.in_features} x {first.out_features})"
            message = f"{names_text([shape, *linears[1:]], 1)}: {message}"
        return Finding(
            rule=f"target-{rule}",
            level=level,
            subject=self.target,
            message=message,
            hint=hint,
            modules=tuple(linear.name for linear in linears),
        )


class Rule(Protocol):
    """A function: a case -> findings."""

    __name__: str

    def __call__(self, case: Case, /) -> Iterator[Finding]:
        """What the reader will mind."""


def config_json(case: Case) -> Iterator[Finding]:
    """All readers but GPTQModel read config.json alone."""
    if not case.facts.in_config_json:
        yield case.say(
            "config",
            "error",
            "config.json holds no quantization_config, and no other file is read",
            "copy the content of quantize_config.json there",
        )


def whole_words(case: Case) -> Iterator[Finding]:
    """Readers allocate K * bits / 32 and N * bits / 32 words, rounding down: a remainder is a wrong shape."""
    odd = [x for x in case.facts.linears if x.in_features * x.bits % 32 or x.out_features * x.bits % 32]
    if odd:
        message = "its codes or zeros do not fill whole 32-bit words"
        yield case.say("shape", "error", message, "leave it dense, or use --bits 8", odd)


def whole_groups(case: Case) -> Iterator[Finding]:
    """Kernels walk whole groups; a shorter last group is refused or misread."""
    odd = [x for x in case.facts.linears if x.group_size != -1 and x.in_features % x.group_size]
    if odd:
        message = f"its inputs do not divide into groups of {odd[0].group_size}"
        yield case.say(
            "group-divides", "error", message, "use a --group-size that divides every input size, or -1", odd
        )


def _marlin(case: Case, level: Level, otherwise: str) -> Iterator[Finding]:
    if not case.facts.sym:
        yield case.say("asymmetric", level, f"asymmetric codes: {otherwise}", "quantize with --sym")
    bits = [bits for bits in case.bits if bits not in (4, 8)]
    if bits:
        yield case.say("bits", level, f"{bits[0]}-bit codes: {otherwise}", "quantize with --bits 4 or 8")
    groups = [group for group in case.groups if group not in MARLIN_GROUPS]
    if groups:
        message = f"group size {groups[0]} (Marlin takes -1, 32, 64, 128): {otherwise}"
        yield case.say("group", level, message, "quantize with --group-size 128, 64 or 32")


def marlin_refuses(case: Case) -> Iterator[Finding]:
    """vLLM has Marlin and its kin only: 4 and 8 bits, symmetric, groups of -1, 32, 64, 128."""
    yield from _marlin(case, "error", "vLLM refuses it")


def marlin_is_left(case: Case) -> Iterator[Finding]:
    """SGLang falls back to its plain kernel, which runs in float16."""
    yield from _marlin(case, "warning", "SGLang serves it with its plain kernel, in float16 only")


def activation_order(case: Case) -> Iterator[Finding]:
    """vLLM refuses desc_act with groups, and does not look at g_idx without desc_act."""
    if case.facts.desc_act and case.facts.group_size != -1:
        yield case.say(
            "activation-order",
            "error",
            "activation order with groups (desc_act) is no longer supported by vLLM",
            "quantize with --no-desc-act; static order has its accuracy",
        )
    elif not case.facts.desc_act and not case.facts.trivial_g_idx:
        yield case.say(
            "activation-order",
            "error",
            "g_idx orders the columns though desc_act is false: vLLM ignores it and computes something else",
        )


def fused_siblings(case: Case) -> Iterator[Finding]:
    """q, k and v (gate and up) are loaded as one matrix: quantized alike, or dense all of them."""
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
        yield case.say(
            "fused-siblings",
            "error",
            "it is fused with its siblings, which have other settings or are dense",
            "give q, k and v (gate and up) the same settings in dynamic",
            odd,
        )


def fused_patterns(case: Case) -> Iterator[Finding]:
    """vLLM matches `dynamic` against the names of fused linears."""
    if case.facts.changed or case.facts.left_dense:
        yield case.say(
            "dynamic",
            "warning",
            "dynamic is matched against fused names (qkv_proj): a pattern for q_proj alone can be missed",
        )


def expert_sizes(case: Case) -> Iterator[Finding]:
    """Marlin takes experts whose sizes are multiples of 64 and of the group; others go to MoeWNA16."""
    odd = [
        x
        for x in case.experts
        if x.in_features % max(64, x.group_size) or x.out_features % max(64, x.group_size)
    ]
    if odd:
        yield case.say("experts", "warning", "experts of this size go to the slower MoeWNA16", "", odd)


def half_precision(case: Case) -> Iterator[Finding]:
    """The kernels run in half precision."""
    if case.facts.dtype not in ("float16", "bfloat16"):
        message = f"the model's dtype is {case.facts.dtype}; its kernels run in float16 or bfloat16"
        yield case.say("dtype", "warning", message, "start the server with --dtype float16")


def float16_only(case: Case) -> Iterator[Finding]:
    """ExLlamaV2 runs in float16 whatever the file says."""
    if case.facts.dtype != "float16":
        message = f"the model's dtype is {case.facts.dtype}; ExLlamaV2 runs it in float16"
        yield case.say("dtype", "warning", message)


def half_scales(case: Case) -> Iterator[Finding]:
    """Scales other than float16 are converted."""
    if case.facts.scale_dtype != "float16":
        message = f"scales are stored as {case.facts.scale_dtype}; they are converted to float16"
        yield case.say("scales", "warning", message)


def cpu_kernel(case: Case) -> Iterator[Finding]:
    """vLLM's CPU build takes less than its CUDA build."""
    odd = [x for x in case.facts.linears if x.in_features % 32 or x.out_features % 32 or x.bits != 4]
    if odd:
        yield case.say(
            "cpu-kernel", "note", "vLLM's CPU kernel takes 4-bit linears in multiples of 32 only", "", odd
        )


def experts_by_marlin_only(case: Case) -> Iterator[Finding]:
    """SGLang's plain kernel knows no experts."""
    facts = case.facts
    plain = not facts.sym or facts.bits not in (4, 8) or facts.group_size not in MARLIN_GROUPS
    if case.experts and plain:
        message = "quantized experts are served by Marlin only: 4 or 8 bits, symmetric, group -1, 32, 64, 128"
        yield case.say("experts", "error", message, "", case.experts)


def no_overrides(case: Case) -> Iterator[Finding]:
    """Transformers ignores `dynamic`; dense linears are found by `modules_in_block_to_quantize` alone."""
    if case.facts.changed or (case.facts.left_dense and not case.facts.modules_listed):
        yield case.say(
            "dynamic",
            "error",
            "Transformers ignores dynamic and looks for packed tensors of equal kind in every linear",
            "quantize all linears of a block alike, or read it with GPTQModel, vLLM or gptq load",
        )


def no_quantized_head(case: Case) -> Iterator[Finding]:
    """Transformers replaces the linears of blocks only."""
    if case.facts.lm_head:
        yield case.say("lm-head", "error", "a quantized lm_head is not read by Transformers")


def no_experts(case: Case) -> Iterator[Finding]:
    """Transformers 5 fuses experts into 3-D tensors."""
    if case.experts:
        message = "Transformers 5 fuses experts into one tensor and has no place for packed ones"
        yield case.say("experts", "error", message, "serve it with vLLM or GPTQModel", case.experts)


def packages(case: Case) -> Iterator[Finding]:
    """Transformers has no GPTQ kernels of its own."""
    yield case.say("packages", "note", "needs optimum 1.24 or newer and gptqmodel 1.4.3 or newer beside it")


def four_bits_only(case: Case) -> Iterator[Finding]:
    """ExLlamaV2's GPTQ kernel."""
    bits = [bits for bits in case.bits if bits != 4]
    if bits:
        yield case.say("bits", "error", f"{bits[0]}-bit codes; allowed: 4", "quantize with --bits 4")


def power_of_two_groups(case: Case) -> Iterator[Finding]:
    """ExLlamaV2 finds the group of a column by shifting."""
    odd = [group for group in case.groups if group != -1 and group & (group - 1)]
    if odd:
        yield case.say("group", "error", f"group size {odd[0]}; allowed: powers of two, -1")


def one_setting(case: Case) -> Iterator[Finding]:
    """ExLlamaV2 does not read `dynamic`."""
    if len(case.groups) > 1:
        yield case.say("dynamic", "error", "linears have different group sizes, and dynamic is not read")


def gptqmodel_groups(case: Case) -> Iterator[Finding]:
    """GPTQModel checks the group size against a list."""
    odd = [group for group in case.groups if group not in GPTQMODEL_GROUPS]
    if odd:
        allowed = ", ".join(map(str, GPTQMODEL_GROUPS))
        yield case.say("group", "error", f"group size {odd[0]}; allowed: {allowed}")


def wrapped_zeros(case: Case) -> Iterator[Finding]:
    """Asymmetric v1 stores zero - 1, which wraps at zero 0: readers add 1 word by word and carry over."""
    if not case.facts.sym and case.facts.checkpoint_format == "gptq":
        yield case.say(
            "zeros",
            "warning",
            "asymmetric codes in format v1: a zero of 0 wraps, and readers disagree about it",
            "write asymmetric codes as gptq_v2",
        )
