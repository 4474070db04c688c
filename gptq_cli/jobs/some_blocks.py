"""`gptq quantize … --blocks N`: some blocks for real, nothing written, and what the whole would take."""

from __future__ import annotations

from dataclasses import replace

from gptq_cli.config import QuantizeJob
from gptq_cli.devices.accelerators import read_memory
from gptq_cli.devices.host_memory import reset_peak_resident
from gptq_cli.engine.loop import LoopOptions
from gptq_cli.engine.opening import EngineRun
from gptq_cli.engine.run import quantize_model
from gptq_cli.events import Observer, ignore
from gptq_cli.fields import check_int
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.jobs.checking import check
from gptq_cli.jobs.forecast import Forecast
from gptq_cli.jobs.header import header
from gptq_cli.jobs.run_report import Tally
from gptq_cli.jobs.steps import announce, watched
from gptq_cli.jobs.watching import watching
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.planning.fisher import file_bytes
from gptq_cli.planning.memory import snapshot_bytes
from gptq_cli.planning.rates import DISK_BYTES_PER_SECOND
from gptq_cli.planning.time import quick_estimate
from gptq_cli.preflight.resolve import refusal
from gptq_cli.results.trial import TrialReport


def trial(job: QuantizeJob, blocks: int, observer: Observer = ignore) -> TrialReport:
    """Quantize the first `blocks` blocks of the job's model and throw the result away; writes nothing.

    Raises what `quantize` raises.
    """
    check_int("blocks", blocks, 1)
    with watching("quantize", observer, job) as watcher:
        watcher.keeps = False
        tally = Tally(watcher, reset_peak_resident())
        checked = check(job, tally, goes_on=False, writes=True)
        announce(checked.findings, tally, known=checked.announced)
        job = checked.job
        resolved, tokens = checked.resolution, checked.tokens
        placement, schedule = resolved.placement, resolved.schedule
        if not checked.findings.ok or placement is None or schedule is None or tokens is None:
            raise refusal(checked.findings)
        watcher.planned(placement, schedule)
        config = checked.work.quantize
        tried = replace(checked.work, quantize=replace(config, tune_epochs=0, fisher_tokens=0))
        plan = Forecast(  # of the whole: gradients and tuning take all blocks
            facts=checked.facts,
            work=checked.work,
            schedule=schedule,
            device=placement.main_device,
            plans=resolved.devices,
        )
        blocks = min(blocks, len(schedule.blocks))
        expected = quick_estimate(checked.facts, checked.work, schedule, placement.main_device)
        tally(header(job, checked, placement, schedule, tokens, expected, trial=blocks))
        devices = watched(placement)
        run = EngineRun(
            skeleton=replace(checked.skeleton, head=None),
            placement=placement,
            schedule=replace(schedule, blocks=schedule.blocks[:blocks]),
            config=tried.quantize,
            options=LoopOptions(strict=job.strict, devices=devices),
        )
        reports = quantize_model(run, tokens.input_ids, _drop, tally).blocks
        tally.record(read_memory(devices))
        own = sum(plan.seconds(tried)[report.name] for report in reports)
        measured = sum(report.seconds for report in reports)
        others = sum(plan.seconds().values()) - own + plan.gradient_seconds() + plan.tuning_seconds()
        written = checked.written_bytes()
        return TrialReport(
            model=job.model.model,
            blocks_total=len(schedule.blocks),
            devices=tuple(str(device) for device in placement.devices),
            phase_seconds=tuple(tally.phase_seconds.items()),
            planned_block_seconds=own,
            seconds=sum(tally.phase_seconds.values())
            + measured
            + others * (measured / own if own else 1.0)
            + written / DISK_BYTES_PER_SECOND,
            predicted_peak_bytes=tuple((p.device, p.predicted_peak_bytes) for p in resolved.devices),
            measured_peak_bytes=tuple(tally.peak_bytes.items()),
            size_after_bytes=written,
            snapshot_bytes=snapshot_bytes(checked.facts, checked.work),
            gradient_bytes=file_bytes(checked.facts, checked.work),
            warnings=tuple(watcher.warnings),
            blocks=reports,
        )


def _drop(linear: LinearInfo, packed: PackedTensors) -> None:
    """The store of a trial."""
