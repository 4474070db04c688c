"""Rules about the readers of GPTQ checkpoints: one per demand; the targets that make it are its topics.

A rule's docstring says what the reader does, and so why the rule exists. An *error* means that the reader
refuses the file or computes something else, a *warning* that it serves it in a slower or narrower way. The
rules come from the sources of vLLM 0.33, SGLang 0.5.23, Transformers 5.24 with Optimum 2.3, GPTQModel 7.7 and
ExLlamaV2, and from running vLLM 0.32 on a CPU, Transformers and GPTQModel.
"""

from __future__ import annotations

from types import ModuleType

from gptq_cli.targets.rules import (
    exllamav2,
    formats,
    gptqmodel,
    parallel,
    servers,
    sglang,
    transformers,
    vllm,
)

MODULES: tuple[ModuleType, ...] = (
    formats,
    servers,
    vllm,
    sglang,
    parallel,
    transformers,
    gptqmodel,
    exllamav2,
)
"""In the order in which their rules are asked."""
