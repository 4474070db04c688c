"""Will that reader take the checkpoint? Facts of one, made or planned, and the rules of five readers.

The rules need shapes and settings only, no tensor: `quantize --target` asks them before it starts, and
`load --target` asks them of a finished checkpoint. They come from the readers' sources as of mid-2026, and
from running vLLM 0.32 on a CPU and Transformers 5.23 with Optimum and GPTQModel 7.6.

An *error* means that the reader refuses the file or computes something else, a *warning* that it serves it
in a slower or narrower way. The rules themselves are in `target_rules`.
"""

from __future__ import annotations

import inspect
from typing import get_args

from gptq_cli.config import Target
from gptq_cli.fields import check_choice
from gptq_cli.findings import Finding
from gptq_cli.results.load import RuleResult, TargetReport
from gptq_cli.targets import rules
from gptq_cli.targets.rules import Case, TargetFacts, TargetLinear

__all__ = ["TARGETS", "Target", "TargetFacts", "TargetLinear", "check_target", "target_report"]

TARGETS: tuple[Target, ...] = get_args(Target)

_RULES: dict[Target, tuple[rules.Rule, ...]] = {
    "vllm": (
        rules.config_json,
        rules.marlin_refuses,
        rules.activation_order,
        rules.whole_words,
        rules.whole_groups,
        rules.fused_siblings,
        rules.fused_patterns,
        rules.expert_sizes,
        rules.half_precision,
        rules.cpu_kernel,
    ),
    "sglang": (
        rules.config_json,
        rules.marlin_is_left,
        rules.whole_words,
        rules.whole_groups,
        rules.fused_siblings,
        rules.experts_by_marlin_only,
        rules.half_precision,
    ),
    "transformers": (
        rules.config_json,
        rules.whole_words,
        rules.whole_groups,
        rules.no_overrides,
        rules.no_quantized_head,
        rules.no_experts,
        rules.packages,
    ),
    "exllamav2": (
        rules.config_json,
        rules.four_bits_only,
        rules.power_of_two_groups,
        rules.one_setting,
        rules.whole_words,
        rules.whole_groups,
        rules.half_scales,
        rules.float16_only,
    ),
    "gptqmodel": (
        rules.gptqmodel_groups,
        rules.whole_words,
        rules.whole_groups,
        rules.wrapped_zeros,
        rules.half_scales,
    ),
}


def target_report(target: Target, facts: TargetFacts) -> TargetReport:
    """Every rule of `target` and what it says. Raises `ConfigError` for an unknown name."""
    check_choice("target", target, TARGETS)
    case = Case(target, facts)
    results = (RuleResult(rule_id(rule), rule_text(rule), tuple(rule(case))) for rule in _RULES[target])
    return TargetReport(target=target, rules=tuple(results))


def check_target(target: Target, facts: TargetFacts) -> tuple[Finding, ...]:
    """All that `target` will mind, in the order of its rules. Raises `ConfigError` for an unknown name."""
    return target_report(target, facts).findings


def rule_id(rule: rules.Rule) -> str:
    """`whole_words` -> `whole-words`."""
    return rule.__name__.replace("_", "-")


def rule_text(rule: rules.Rule) -> str:
    """What the reader does, and so why the rule exists: its docstring."""
    return inspect.cleandoc(rule.__doc__ or "")
