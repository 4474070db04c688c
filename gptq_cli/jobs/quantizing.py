"""The steps of `gptq quantize` on one screen: open, check, work, report.

Everything that can be known from config.json, the headers of the files and the calibration text is checked
before a weight is read; `dry_run` stops there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from gptq_cli.checkpoint.destination import Destination
from gptq_cli.checkpoint.fingerprint import Fingerprint, bits_asked
from gptq_cli.checkpoint.held_signals import held_signals
from gptq_cli.checkpoint.kept_states import StatesOnDisk
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.config import QuantizeJob
from gptq_cli.devices.accelerators import read_memory
from gptq_cli.devices.host_memory import reset_peak_resident
from gptq_cli.engine.loop import LoopOptions
from gptq_cli.engine.opening import EngineRun
from gptq_cli.engine.run import Quantized, quantize_model
from gptq_cli.errors import NonFinite, SourceChanged
from gptq_cli.events import Observer, RunFinished, ShardWritten, ignore, phase
from gptq_cli.jobs.accepting import Accepted, Asked, accepted
from gptq_cli.jobs.card import Card
from gptq_cli.jobs.checking import check
from gptq_cli.jobs.claiming import claimed
from gptq_cli.jobs.forecast import Forecast, against_plan
from gptq_cli.jobs.header import header
from gptq_cli.jobs.keeping import Keeping, keeping
from gptq_cli.jobs.proof import prove
from gptq_cli.jobs.pushing import uploaded
from gptq_cli.jobs.resuming import continuing
from gptq_cli.jobs.run_report import Tally, summarize
from gptq_cli.jobs.settings import settings_of
from gptq_cli.jobs.shared_files import send_files
from gptq_cli.jobs.steps import announce, rates_for, watched
from gptq_cli.jobs.together import Assignment, account, check_share
from gptq_cli.jobs.watching import Watcher, out_of_memory_while, watching
from gptq_cli.load_job import LoadJob
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import packed_bytes
from gptq_cli.planning.ranks import ranks_plan
from gptq_cli.planning.time import estimate
from gptq_cli.planning.words import streaming_words
from gptq_cli.preflight.facts import Claim
from gptq_cli.preflight.report import map_report, own_settings, quantize_plan, time_shown
from gptq_cli.ranks.joining import Joined
from gptq_cli.results.card import CardMaker
from gptq_cli.results.document import document
from gptq_cli.results.map import MapReport
from gptq_cli.results.push import PushConfig
from gptq_cli.results.run import RankReport, RunReport


def quantize(
    job: QuantizeJob,
    observer: Observer = ignore,
    *,
    card: CardMaker | None = None,
    proof: LoadJob | None = None,
    push: PushConfig | None = None,
    joined: Joined | None = None,
) -> RunReport:
    """Quantize a model and write the checkpoint to `job.out`.

    `card` makes its model card; None: without one. `proof`: what to measure of the checkpoint at `job.out`
    once it is there; a gate that it fails is data, see `LoadReport.ok`. `push`: upload it at the end, unless
    it failed a gate. `joined`: the ranks that work together; this one leads.

    Raises `UsageError` (nothing was started), `PreflightRefused` (nothing was written), `OutOfDeviceMemory`,
    `QualityGateFailed`. Where something would lie on disk, the `PreflightRefused` is a `ValueError` as well.
    Whatever is raised, finished blocks are kept in the working folder, and the same job goes on after them
    (`continuing`); where nothing was finished, or the model itself is at fault, no working folder is left.
    """
    asked = Asked(job, card, proof, push, time.perf_counter(), joined)
    with watching("quantize", observer, job) as watcher:
        tally = Tally(watcher, reset_peak_resident())
        with continuing(job), out_of_memory_while(watcher, "quantize"), claimed(job, tally) as claim:
            report, skeleton, own_card = _quantize(asked, claim, watcher, tally)
        if proof is not None:
            report = prove(report, proof, skeleton, own_card, watcher)
        if push is not None and not (report.proof and report.proof.failures):
            report = replace(report, pushed=uploaded(job.out, push, watcher))
        if asked.goes_on:
            watcher(RunFinished(report))
    return report


def _quantize(
    asked: Asked, claim: Claim, watcher: Watcher, tally: Tally
) -> tuple[RunReport, Skeleton, Card | None]:
    """The work up to the checkpoint in place: its report, its model, its card."""
    plan = accepted(asked, claim, watcher, tally)
    tally(
        header(
            plan.given,
            plan.checked,
            plan.placement,
            plan.schedule,
            plan.tokens,
            plan.expected,
            finished=plan.done.blocks,
            joined=asked.joined,
        )
    )
    fingerprint = Fingerprint.of(plan.job, plan.skeleton, plan.tokens)
    devices = watched(plan.placement)
    with (
        _nothing_kept_of_a_faulty_model(plan.destination),
        _writer(plan.job, plan.skeleton, claim, tally) as writer,
        keeping(
            plan.journal,
            fingerprint,
            asked=bits_asked(asked.job),
            writer=writer,
            destination=plan.destination,
            skeleton=plan.skeleton,
            devices=tuple(str(device) for device in plan.placement.devices),
            started=asked.started,
            observer=tally,
            warnings=lambda: tuple(watcher.warnings),
            team=asked.team,
        ) as keeper,
    ):
        watcher.kept = bool(keeper.finished)
        asked.team.decided(
            lambda: Assignment(
                job=plan.given,
                config=plan.job.quantize,
                placement=plan.placement,
                schedule=plan.schedule,
                tokens=plan.tokens,
                fingerprint=fingerprint,
                revision=plan.skeleton.files.revision,
                finished=keeper.finished,
            )
        )
        run = EngineRun(
            skeleton=plan.skeleton,
            placement=plan.placement,
            schedule=plan.schedule,
            config=plan.job.quantize,
            options=LoopOptions(strict=plan.job.strict, devices=devices, team=asked.team),
            states=StatesOnDisk(plan.destination.gradients),
        )
        if asked.joined is not None:
            run = replace(run, shards=send_files(asked.joined, plan.skeleton, tally))
        observer = against_plan(_forecast(plan), tally)
        quantized = quantize_model(run, plan.tokens.input_ids, writer.add_packed, observer, keeper)
        ranks = account(asked.joined) if asked.joined is not None else ()
        with phase(tally, "save"):
            writer.copy_dense()
            if quantized.tuned is not None:
                writer.replace(quantized.tuned.tensors)
        tally.record(read_memory(devices))
        report = _summary(asked, plan, quantized, writer, tally, keeper, ranks)
        card = None
        if asked.card is not None:
            card = Card(asked.card, plan.job, plan.skeleton, tally, asked.name)
        writer.complete(document(report), partial(card.files, report) if card else None)
        with held_signals() as stop_if_heard:  # one that comes now waits until the run is known to be done
            stop_if_heard()
            writer.put_in_place()
            if not asked.goes_on:
                tally(RunFinished(report))
    return report, plan.skeleton, card


def _forecast(plan: Accepted) -> Forecast:
    return Forecast(
        facts=plan.checked.facts,
        work=plan.checked.work,
        schedule=plan.schedule,
        device=plan.placement.main_device,
        plans=plan.checked.resolution.devices,
    )


def _summary(
    asked: Asked,
    plan: Accepted,
    quantized: Quantized,
    writer: CheckpointWriter,
    tally: Tally,
    keeper: Keeping,
    ranks: tuple[RankReport, ...],
) -> RunReport:
    """The report of a run whose tensors are all written."""
    checked, job = plan.checked, plan.job
    return summarize(
        job=job,
        skeleton=plan.skeleton,
        tokens=plan.tokens,
        schedule=plan.schedule,
        devices=[str(device) for device in plan.placement.devices],
        streaming=streaming_words(checked.facts, plan.placement, plan.schedule),
        predicted_peak_bytes=[
            (device.device, device.predicted_peak_bytes) for device in checked.resolution.devices
        ],
        blocks=quantized.blocks,
        head=quantized.head,
        tuning=quantized.tuned.report if quantized.tuned is not None else None,
        own_settings=own_settings(checked.facts, job.quantize),
        kept_dense=checked.facts.kept,
        packed_bytes=sum(packed_bytes(linear, job.quantize) for linear in checked.facts.packed),
        size_after_bytes=writer.plan.size_bytes,
        findings=checked.findings.ordered(),
        bits=checked.bits,
        estimate=plan.expected,
        tally=tally,
        kept=keeper,
        ranks=ranks,
        settings=settings_of(
            replace(job, quantize=replace(job.quantize, modules=plan.given.quantize.modules)),
            revision=plan.skeleton.files.revision or job.model.revision,
            card=asked.card is not None,
            proof=asked.proof,
        ),
    )


@contextmanager
def _nothing_kept_of_a_faulty_model(destination: Destination) -> Iterator[None]:
    """Keep no work of a model whose files changed, or in which numbers are not finite: it is of no use."""
    try:
        yield
    except (SourceChanged, NonFinite):
        destination.kept = False
        raise


def dry_run(
    job: QuantizeJob,
    observer: Observer = ignore,
    *,
    proof: LoadJob | None = None,
    push: PushConfig | None = None,
    processes: int | None = None,
) -> MapReport:
    """What `quantize` would do with this job, and whether it may; reads no weight and writes nothing.

    `processes`: as many, started by torchrun, would share the work; None: there is no launcher.
    """
    check_share(job, processes or 1)
    with watching("quantize", observer, job) as watcher:
        checked = check(job, watcher, proof=proof, push=push, processes=processes)
        announce(checked.findings, watcher)
        job = checked.job
        speed = rates_for(job, checked.skeleton, checked.facts, checked.resolution, thorough=True)
        schedule = checked.resolution.schedule
        facts, work = checked.facts, replace(checked.work, ranks=0)  # the time of one process
        asked = Work(job.quantize, job.calibration, processes or 0)
        took = gain = None
        if speed is not None and schedule is not None:
            took = estimate(facts, work, schedule, speed)
        if processes and schedule is not None:
            gain = ranks_plan(facts, work, schedule, speed, processes)
        measuring = None
        if checked.measures is not None and speed is not None:
            measuring = checked.measures.seconds(job, speed)
        size = checked.written_bytes()
        plan = replace(
            quantize_plan(facts, asked, took, checked.writing_seconds, measuring),
            size_after_bytes=size,
            bits_per_parameter=8 * size / max(1, facts.parameters),
            ranks=gain,
            bit_choice=checked.bits,
        )
        return map_report(
            checked.facts,
            checked.resolution,
            spec=job.device_map,
            budgets=checked.budgets,
            max_memory=job.max_memory,
            report=checked.findings,
            given=job.devices is not None,
            plan=plan,
            time=time_shown(took),
            warnings=watcher.warnings,
        )


def _writer(job: QuantizeJob, skeleton: Skeleton, claim: Claim, observer: Observer) -> CheckpointWriter:
    return CheckpointWriter(
        Path(job.out),
        skeleton,
        job.quantize,
        max_shard_bytes=job.max_shard_bytes,
        overwrite=job.overwrite,
        destination=claim.destination,
        on_shard=lambda path, size, tensors: observer(ShardWritten(path.name, size, tensors)),
    )
