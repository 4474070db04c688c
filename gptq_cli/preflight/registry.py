"""All rules by id, what `--explain RULE` prints, and the check of a whole quantization job.

A rule is registered by being defined in one of the modules below; see `gptq_cli.rules`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

from gptq_cli.checkpoint import rules as verify_rules
from gptq_cli.errors import ConfigError
from gptq_cli.findings import PreflightReport
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.source import SourceProblem
from gptq_cli.placement.device import Device
from gptq_cli.planning.cases import Capability, JobCase, OutputFacts, Work
from gptq_cli.preflight.rules import (
    bits,
    calibration,
    device_map,
    memory,
    model_files,
    modules,
    output,
    placement,
    push,
    quantization,
    resume,
    targets,
)
from gptq_cli.readers import Target
from gptq_cli.rules import Rule, rules_in
from gptq_cli.targets.rules import MODULES as TARGET_MODULES

_JOB: tuple[ModuleType, ...] = (model_files, quantization, modules, targets, output, resume)
_MAP: tuple[ModuleType, ...] = (device_map, placement, memory)
MODULES: tuple[ModuleType, ...] = (calibration, bits, push, *_JOB, *_MAP, *TARGET_MODULES, verify_rules)
"""Where rules are defined; the docstring of each begins with what they are about."""

RULES: Mapping[str, Rule[Any]] = MappingProxyType(
    {one.id: one for module in MODULES for one in rules_in(module)}
)
"""Every rule, in the order of the modules and of the definitions in them."""


def explain(rule: str) -> str:
    """What a rule means and why it exists. Raises `ConfigError` for an unknown id."""
    return find_rule(rule).explanation


def find_rule(rule: str) -> Rule[Any]:
    """The rule with this id. Raises `ConfigError`, with the nearest ids, where there is none."""
    found = RULES.get(rule)
    if found is None:
        close = difflib.get_close_matches(rule, RULES, n=2)
        if close:
            raise ConfigError(f"{rule!r} is not a rule", hint=f"did you mean {' or '.join(close)}?")
        raise ConfigError(f"{rule!r} is not a rule; available: {', '.join(RULES)}", hint="see docs/rules.md")
    return found


def check_quantize(
    facts: ModelFacts,
    work: Work,
    *,
    problems: tuple[SourceProblem, ...] = (),
    output: OutputFacts | None = None,
    overwrite: bool = False,
    devices: tuple[Device, ...] = (),
    capabilities: tuple[Capability, ...] = (),
    targets: tuple[Target, ...] = (),
    tp: int = 1,
    asked: frozenset[str] | None = None,
) -> PreflightReport:
    """All findings about files, sizes, calibration, dtype, targets and output; never raises.

    `work`: as it was asked for; the rules look at what it comes to for the model.
    `output` None leaves the rules about the output out; `devices` are those that will compute. `asked`: rules
    about what the checkpoint would hold are left out unless their topics name one of these config fields;
    None: all are asked.
    """
    case = JobCase(
        facts=facts,
        work=work.on(facts),
        fisher_tokens=work.quantize.fisher_tokens,
        output=output,
        overwrite=overwrite,
        problems=problems,
        capabilities=capabilities,
        devices=devices,
        targets=targets,
        tp=tp,
    )
    rules = [one for module in _JOB for one in rules_in(module)]
    fitting = [one for one in rules if asked is None or not one.topics or asked.intersection(one.topics)]
    found = tuple(finding for one in fitting for finding in one(case))
    return PreflightReport(PreflightReport(found).ordered())
