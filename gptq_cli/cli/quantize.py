"""`gptq quantize MODEL --out DIR`: the main job."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli import task_options as task
from gptq_cli.cli.config_options import Codes, Solver, Text, asked_before, bits_given, with_config_options
from gptq_cli.cli.failure import report_refused
from gptq_cli.cli.output import Session, show, watch
from gptq_cli.cli.page_file import check_page, with_page
from gptq_cli.cli.ranks import Processes
from gptq_cli.config import (
    CalibrationConfig,
    ModelRef,
    QuantizeConfig,
    QuantizeJob,
    parse_shard_size,
)
from gptq_cli.display.choose import Progress
from gptq_cli.errors import ConfigError, Interrupted, QualityGateFailed, RankLost
from gptq_cli.fields import check_int
from gptq_cli.load_job import LoadJob, one_text, proof_job, task_config
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import parse_inventory
from gptq_cli.ranks.launch import Launch
from gptq_cli.readers import parse_targets
from gptq_cli.results.push import PushConfig


@with_config_options
def quantize(
    context: typer.Context,
    model: o.Model,
    *,
    out: o.Out = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = "auto",
    max_shard_size: o.MaxShardSize = "5GB",
    target: o.QuantizeTargets = None,
    tp: o.QuantizeTensorParallel = 1,
    report: o.Report = None,
    card: o.Card = "full",
    push_to_hub: o.PushToHub = None,
    private: o.Private = False,
    recipe: o.Recipe = "balanced",
    codes: Codes,
    module: o.Modules = None,
    text: Text,
    device_map: o.DeviceMapText = "auto",
    max_memory: o.MaxMemoryText = None,
    devices: o.Devices = None,
    dtype: o.DType = "auto",
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    solver: Solver,
    dry_run: o.DryRun = False,
    processes: Processes = None,
    blocks: o.Blocks = None,
    strict: o.Strict = False,
    evaluate: o.Evaluate = None,
    against_source: o.AgainstSource = False,
    max_kl: o.MaxKl = None,
    max_perplexity: o.MaxPerplexity = None,
    tasks: task.Tasks = None,
    task_dir: task.TaskDir = None,
    task_limit: task.TaskLimit = None,
    shots: task.Shots = None,
    min_score: task.MinScore = None,
    bench: o.Bench = False,
    config: o.Config = None,
    as_json: o.Json = False,
    progress: o.Progress = "auto",
    log_file: o.LogFile = None,
    events: o.EventsFile = None,
    quiet: o.Quiet = False,
) -> None:
    """Quantize MODEL and write a GPTQ checkpoint to --out.

    Preflight checks the job before a weight is read and reports everything at once.

    The checkpoint appears at the very end. After an interruption the same command goes on.
    """
    session: Session = context.obj
    quantize_config = QuantizeConfig.of(recipe, **bits_given(context, codes, module), **solver)
    if devices is not None and not dry_run:
        raise ConfigError(
            "devices is given, but this is not a dry run", hint="add --dry-run, or leave --devices out"
        )
    if processes is not None:
        check_int("processes", processes, 1)
        if not dry_run:
            raise ConfigError(
                "processes is given, but this is not a dry run",
                hint="add --dry-run, or start them: "
                f"torchrun --nproc-per-node {processes} -m gptq_cli quantize …",
            )
    if blocks is not None and dry_run:
        raise ConfigError("blocks is given, but a dry run works on none", hint="leave --dry-run out")
    if out is None and (dry_run or blocks is not None):
        size = quantize_config.group_size
        group = "" if size == "auto" else f"g{size}"
        budget = quantize_config.bits_per_weight
        width = f"w{quantize_config.bits}" if budget is None else f"b{budget:g}"
        out = f"{Path(model).name or 'model'}-{width}{group}"
    launch = Launch.of(os.environ)
    page = None
    if report is not None and (launch is None or launch.leads):
        written = {"out": out, "log_file": session.log_file, "events": session.events}
        page = check_page("report", report, written, out=out)
    if launch is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of every rank that leaves
    job = QuantizeJob(
        model=ModelRef(model=model, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype),
        out=out or "",
        quantize=quantize_config,
        calibration=CalibrationConfig.of(**text),
        device_map=DeviceMap.parse(device_map),
        max_memory=MaxMemory.parse(max_memory) if max_memory is not None else None,
        devices=parse_inventory(devices) if devices is not None else None,
        max_shard_bytes=parse_shard_size(max_shard_size),
        overwrite=overwrite,
        strict=strict,
        targets=parse_targets(target or (), tp),
        tp=tp,
        resume=resume,
        asked_before=asked_before(context, quantize_config),
        command_line=(*(("gptq",) if launch is None else launch.command), *session.argv),
    )
    proof = proof_job(
        job.out,
        model,
        evaluate=one_text(evaluate),
        against_source=against_source,
        max_kl=max_kl,
        max_perplexity=max_perplexity,
        tasks=task_config(
            tasks, directory=task_dir, limit=task_limit, shots=shots, min_scores=min_score or ()
        ),
        bench=bench,
        device_map=job.device_map,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if private and push_to_hub is None:
        raise ConfigError("private is given, but nothing is uploaded", hint="add --push-to-hub user/name")
    push = None if push_to_hub is None else PushConfig(repo_id=push_to_hub, private=private)
    if launch is not None and not launch.leads:
        if not dry_run and blocks is None:  # rank 0 does these by itself
            _follow(session, job, launch)
        return
    if dry_run:
        planned = launch.size if processes is None and launch is not None else processes
        _plan(session, job, proof, push, progress, quiet, planned)
        return
    if blocks is not None:
        if proof is not None or push is not None:
            raise ConfigError(
                "blocks is given, so there will be no checkpoint to measure or upload",
                hint="leave out --blocks, or --eval, --against-source, --bench and --push-to-hub",
            )
        _trial(session, job, blocks, progress, quiet)
        return
    with watch(session, progress, quiet=quiet) as observer:
        from gptq_cli import jobs
        from gptq_cli.report.card import card_files

        try:
            maker = card_files if card == "full" else None
            result = jobs.quantize(
                job, observer, card=maker, proof=proof, push=push, launch=launch, heard=session.join
            )
        except Interrupted as error:
            session.interrupted = error
            raise
        if page is not None:
            from gptq_cli.report.page import report_html

            result = with_page(page, result, report_html, observer, "report.json holds the same")

    from gptq_cli.display.load import quantized_summary

    show(session, result, quantized_summary)
    if result.proof is not None and result.proof.failures:
        raise QualityGateFailed(
            "; ".join(result.proof.failures),
            hint="the checkpoint is complete and stays; the figures are on stdout and in its report.json",
        )


def _follow(session: Session, job: QuantizeJob, launch: Launch) -> None:
    """What every rank but the first does. Its files of events are those of the first."""
    session.log_file = session.events = None
    with watch(session, "none", quiet=True):
        from gptq_cli import jobs

        try:
            jobs.follow(job, launch, came=session.come, heard=session.join)
        except RankLost as error:
            session.came = error.rank != 0 or not launch.speaks_for_its_machine
            raise


def _plan(
    session: Session,
    job: QuantizeJob,
    proof: LoadJob | None,
    push: PushConfig | None,
    progress: Progress,
    quiet: bool,
    processes: int | None,
) -> None:
    """What `--dry-run` does in place of the work. Exit 0, or 3 where the job would be refused."""
    with watch(session, progress, quiet=quiet, findings_in_result=True) as observer:
        from gptq_cli import jobs

        plan = jobs.dry_run(job, observer, proof=proof, push=push, processes=processes)

    from gptq_cli.display.maps import map_summary

    show(session, plan, map_summary)
    if not plan.ok:
        report_refused(plan.findings, session.json_lines)
        raise typer.Exit(3)


def _trial(session: Session, job: QuantizeJob, blocks: int, progress: Progress, quiet: bool) -> None:
    """What `--blocks` does: a part of the work, and what the whole would take."""
    with watch(session, progress, quiet=quiet) as observer:
        from gptq_cli import jobs

        result = jobs.trial(job, blocks, observer)

    from gptq_cli.display.tables import trial_summary

    show(session, result, trial_summary)
