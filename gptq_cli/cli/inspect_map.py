"""`gptq inspect-map MODEL --device-map SPEC`: where everything would go, and whether that is allowed."""

from __future__ import annotations

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.config_options import (
    CODES,
    Codes,
    SolverMemory,
    TextSize,
    bits_given,
    with_config_options,
)
from gptq_cli.cli.failure import report_refused
from gptq_cli.cli.output import Session, show, watch
from gptq_cli.cli.ranks import Processes
from gptq_cli.config import (
    CalibrationConfig,
    InspectJob,
    ModelRef,
    QuantizeConfig,
)
from gptq_cli.fields import check_int
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import parse_inventory
from gptq_cli.readers import parse_targets


@with_config_options
def inspect_map(
    context: typer.Context,
    model: o.Model,
    *,
    device_map: o.DeviceMapText = "auto",
    max_memory: o.MaxMemoryText = None,
    devices: o.Devices = None,
    processes: Processes = None,
    target: o.QuantizeTargets = None,
    tp: o.QuantizeTensorParallel = 1,
    explain: o.Explain = None,
    recipe: o.Recipe = "balanced",
    codes: Codes,
    module: o.Modules = None,
    solver: SolverMemory,
    text: TextSize,
    dtype: o.DType = "auto",
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    as_json: o.Json = False,
    progress: o.Progress = "auto",
    log_file: o.LogFile = None,
    events: o.EventsFile = None,
    quiet: o.Quiet = False,
) -> None:
    """Show where every module of MODEL would go, what each device would hold, and whether that is allowed.

    Reads config.json and the headers of the safetensors files, no weight. Exit 0, or 3: refused by preflight.

    The memory is that of gptq quantize with the same options. Bits and groups are checked where given.
    """
    session: Session = context.obj
    if processes is not None:
        check_int("processes", processes, 1)
    job = InspectJob(
        model=ModelRef(model=model, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype),
        device_map=DeviceMap.parse(device_map),
        max_memory=MaxMemory.parse(max_memory) if max_memory is not None else None,
        devices=parse_inventory(devices) if devices is not None else None,
        quantize=QuantizeConfig.of(recipe, **bits_given(context, codes, module), **solver),
        calibration=CalibrationConfig.of(**text),
        targets=parse_targets(target or (), tp),
        tp=tp,
        processes=processes,
        asked=frozenset(name for name in CODES if _given(context, name)) | ({"modules"} if module else set()),
    )
    with watch(session, progress, quiet=quiet, findings_in_result=True) as observer:
        from gptq_cli import jobs

        report = jobs.inspect_map(job, observer)

    from gptq_cli.display.maps import map_summary

    show(session, report, map_summary)
    if not report.ok:
        report_refused(report.findings, session.json_lines)
        raise typer.Exit(3)


def _given(context: typer.Context, name: str) -> bool:
    """Whether a flag, the environment or a preset set this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
