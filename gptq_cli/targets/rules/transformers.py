"""Rules about Transformers 5.24, which loads GPTQ through Optimum 2.3 and runs it on GPTQModel's kernels."""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.rules import Remark, rule
from gptq_cli.targets.facts import Case


@rule("error", topics=("transformers",))
def no_overrides(case: Case) -> Iterator[Remark]:
    """Transformers ignores `dynamic`; dense linears are found by `modules_in_block_to_quantize` alone."""
    if case.facts.changed or (case.facts.dense and not case.facts.modules_listed):
        yield case.remark(
            "Transformers ignores dynamic and expects packed tensors of the same kind in every linear",
            "quantize all linears of a block alike, or read it with GPTQModel, vLLM or gptq load",
        )


@rule("error", topics=("transformers",))
def blocks_by_name(case: Case) -> Iterator[Remark]:
    """Optimum knows four names of the list of blocks; for others the config has `block_name_to_quantize`."""
    if not case.facts.blocks_found:
        yield case.remark(
            "Optimum does not find the decoder blocks of this model",
            "add block_name_to_quantize, the name of their list, to quantization_config in config.json",
        )


@rule("error", topics=("transformers",))
def no_quantized_head(case: Case) -> Iterator[Remark]:
    """Transformers replaces the linears of blocks only, so a quantized head is not read."""
    if case.facts.lm_head:
        yield case.remark("a quantized lm_head is not read by Transformers", "leave the head dense")


@rule("error", topics=("transformers",))
def no_experts(case: Case) -> Iterator[Remark]:
    """Transformers 5 fuses experts into 3-D tensors, which cannot hold packed ones."""
    if case.experts:
        message = "Transformers 5 fuses experts into one tensor and has no place for packed ones"
        yield case.remark(message, "serve it with vLLM or GPTQModel", case.experts)


@rule("note", topics=("transformers",))
def packages(case: Case) -> Iterator[Remark]:
    """Transformers has no GPTQ kernels of its own; Optimum and GPTQModel bring them."""
    yield case.remark("needs optimum 2.3 or newer and gptqmodel 7.0 or newer beside it")
