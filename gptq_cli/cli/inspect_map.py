"""`gptq inspect-map MODEL --device-map SPEC`: where would everything go, and is that allowed."""

from __future__ import annotations

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.output import Session, show, watch, without_findings
from gptq_cli.config import CalibrationConfig, InspectJob, ModelRef, QuantizeConfig, parse_targets
from gptq_cli.device_map import DeviceMap, MaxMemory
from gptq_cli.placement import parse_inventory

RECIPE = QuantizeConfig()
TEXT = CalibrationConfig()


def inspect_map(
    context: typer.Context,
    model: o.Model,
    device_map: o.DeviceMapText = "auto",
    max_memory: o.MaxMemoryText = None,
    devices: o.Devices = None,
    target: o.QuantizeTargets = None,
    explain: o.Explain = None,
    bits: o.Bits = RECIPE.bits,
    group_size: o.GroupSize = RECIPE.group_size,
    sym: o.Sym = RECIPE.sym,
    desc_act: o.DescAct = RECIPE.desc_act,
    true_sequential: o.TrueSequential = RECIPE.true_sequential,
    samples: o.Samples = TEXT.samples,
    seq_len: o.SeqLen = TEXT.seq_len,
    batch_size: o.BatchSize = TEXT.batch_size,
    dtype: o.DType = "auto",
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    as_json: o.Json = False,
    progress: o.Progress = "auto",
    quiet: o.Quiet = False,
) -> None:
    """Show where every module of MODEL would go, what each device would hold, and whether that is allowed.

    Reads config.json and the headers of the safetensors files, no weight. Exit 0, or 3: refused by preflight.
    """
    session: Session = context.obj
    job = InspectJob(
        model=ModelRef(model=model, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype),
        device_map=DeviceMap.parse(device_map),
        max_memory=MaxMemory.parse(max_memory) if max_memory is not None else None,
        devices=parse_inventory(devices) if devices is not None else None,
        quantize=QuantizeConfig(
            bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, true_sequential=true_sequential
        ),
        calibration=CalibrationConfig(samples=samples, seq_len=seq_len, batch_size=batch_size),
        targets=parse_targets(target or ()),
    )
    with watch(session, progress, quiet=quiet) as observer:
        from gptq_cli import jobs

        report = jobs.inspect_map(job, without_findings(observer))

    from gptq_cli.display.maps import map_summary

    show(session, report, map_summary)
    if not report.ok:
        raise typer.Exit(3)
