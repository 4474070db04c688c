"""Rules about what most readers of checkpoints ask: whole words and groups, where the config stands."""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.rules import Remark, rule
from gptq_cli.targets.facts import TARGETS, Case
from gptq_cli.wording import number_of


@rule("error", topics=("vllm", "sglang", "transformers", "exllamav2"))
def config_json(case: Case) -> Iterator[Remark]:
    """All readers but GPTQModel read config.json alone."""
    if not case.facts.in_config_json:
        yield case.remark(
            "config.json holds no quantization_config, and no other file is read",
            "copy the content of quantize_config.json there",
        )


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


@rule("warning", topics=TARGETS)
def stored_once(case: Case) -> Iterator[Remark]:
    """Packed linears at several places of a model (Zamba's transformer) are stored under the first of them.

    `gptq load` puts them at every place. No other reader was tried with such a model; one that looks for
    packed tensors at every place leaves the others without values.
    """
    if case.facts.shared:
        message = (
            f"{number_of(len(case.facts.shared), 'linear', 'has', 'have')} the weights of others, "
            f"which are stored once: not tried with {case.target}"
        )
        yield case.remark(message, "compare its output with that of gptq load, or leave them dense: --module")


@rule("warning", topics=("exllamav2", "gptqmodel"))
def half_scales(case: Case) -> Iterator[Remark]:
    """Scales are converted to float16, which rounds those that are stored in another type."""
    if case.facts.scale_dtype != "float16":
        message = f"scales are stored as {case.facts.scale_dtype}; they are converted to float16"
        yield case.remark(message)
