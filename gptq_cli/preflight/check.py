"""Everything about a quantization job that is not about devices, judged at once."""

from __future__ import annotations

from gptq_cli.config import Target
from gptq_cli.device import Device
from gptq_cli.findings import PreflightReport
from gptq_cli.model.source import SourceProblem
from gptq_cli.placement import ModelFacts
from gptq_cli.preflight import rules_output, rules_quantize, rules_readers, rules_source
from gptq_cli.preflight.cases import Capability, JobCase, OutputFacts, Work


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
) -> PreflightReport:
    """All findings about files, sizes, calibration, dtype, readers and output; never raises.

    `output` None leaves the rules about the output out; `devices` are those that will compute.
    """
    case = JobCase(
        facts=facts,
        work=work,
        output=output,
        overwrite=overwrite,
        problems=problems,
        capabilities=capabilities,
        devices=devices,
        targets=targets,
    )
    rules = (*rules_source.RULES, *rules_quantize.RULES, *rules_readers.RULES, *rules_output.RULES)
    found = tuple(finding for rule in rules for finding in rule(case))
    return PreflightReport(PreflightReport(found).ordered())
