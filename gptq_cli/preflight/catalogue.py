"""All rules by id, and the text behind `--explain RULE`: a rule's docstring is its explanation."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from gptq_cli.errors import ConfigError
from gptq_cli.preflight.rules import device_map as rules_map
from gptq_cli.preflight.rules import memory as rules_memory
from gptq_cli.preflight.rules import model_files as rules_source
from gptq_cli.preflight.rules import output as rules_output
from gptq_cli.preflight.rules import placement as rules_placement
from gptq_cli.preflight.rules import quantization as rules_quantize
from gptq_cli.preflight.rules import targets as rules_readers

Rule = Callable[..., Any]


def rule_id(rule: Rule) -> str:
    """`disk_offload` -> `disk-offload`."""
    return rule.__name__.replace("_", "-")


_ALL: tuple[Rule, ...] = (
    *rules_source.RULES,
    rules_source.tokenizer,
    rules_source.calibration_text,
    *rules_quantize.RULES,
    *rules_readers.RULES,
    *rules_output.RULES,
    *rules_map.RULES,
    *rules_placement.RULES,
    rules_memory.disk_offload,
    rules_memory.no_plan_fits,
    rules_memory.memory_budget,
    rules_memory.memory_tight,
)
RULES: Mapping[str, Rule] = MappingProxyType({rule_id(rule): rule for rule in _ALL})
"""Every rule, in the order in which they run."""


def explain(rule: str) -> str:
    """What a rule means and why it exists. Raises `ConfigError` for an unknown id."""
    found = RULES.get(rule)
    if found is None:
        close = difflib.get_close_matches(rule, RULES, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else "see docs/preflight-rules.md"
        raise ConfigError(f"{rule!r} is no rule; allowed: {', '.join(RULES)}", hint=hint)
    return inspect.getdoc(found) or ""
