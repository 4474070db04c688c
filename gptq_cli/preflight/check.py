"""Everything about a quantization job that is not about devices, judged at once."""

from __future__ import annotations

from gptq_cli.config import Target
from gptq_cli.findings import PreflightReport
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.source import SourceProblem
from gptq_cli.placement.device import Device
from gptq_cli.planning.cases import Capability, JobCase, OutputFacts, Work
from gptq_cli.preflight.rules import model_files as rules_source
from gptq_cli.preflight.rules import output as rules_output
from gptq_cli.preflight.rules import quantization as rules_quantize
from gptq_cli.preflight.rules import targets as rules_readers


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
    asked: frozenset[str] | None = None,
) -> PreflightReport:
    """All findings about files, sizes, calibration, dtype, readers and output; never raises.

    `output` None leaves the rules about the output out; `devices` are those that will compute. `asked`: what
    the checkpoint would hold is judged by these fields of the QuantizeConfig alone; None: by all.
    """
    work = work.on(facts)
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
    judged = [r for r in rules if asked is None or r not in _ABOUT_CODES or _ABOUT_CODES[r] & asked]
    found = tuple(finding for rule in judged for finding in rule(case))
    return PreflightReport(PreflightReport(found).ordered())


_ABOUT_CODES = {
    rules_quantize.group_divides: {"group_size"},
    rules_quantize.group_too_large: {"group_size"},
    rules_quantize.packing_rows: {"bits"},
    rules_quantize.packing_columns: {"bits"},
    rules_readers.readers_lost: {"bits", "group_size", "sym", "desc_act"},
}
"""Rules about what the checkpoint would hold, and the fields that they judge."""
