"""Rules about ExLlamaV2, whose GPTQ kernel is that of 2023; ExLlamaV3 reads no GPTQ checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.rules import Remark, rule
from gptq_cli.targets.facts import Case


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
        message = f"group size {odd[0]}; allowed: powers of two, -1"
        yield case.remark(message, "quantize with --group-size 128, 64 or 32")


@rule("error", topics=("exllamav2",))
def one_setting(case: Case) -> Iterator[Remark]:
    """ExLlamaV2 does not read `dynamic`, so all linears need the same group size."""
    if len(case.groups) > 1:
        message = "linears have different group sizes, and dynamic is not read"
        yield case.remark(message, "quantize all linears with one --group-size")


@rule("warning", topics=("exllamav2",))
def float16_only(case: Case) -> Iterator[Remark]:
    """ExLlamaV2 runs in float16 whatever the file says."""
    if case.facts.dtype != "float16":
        message = f"the model's dtype is {case.facts.dtype}; ExLlamaV2 runs it in float16"
        yield case.remark(message)
