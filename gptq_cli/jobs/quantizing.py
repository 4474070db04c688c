"""The steps of `gptq quantize` on one screen: open, check, work, report.

Everything that can be known from config.json, the headers of the files and the calibration text is checked
before a weight is read; `dry_run` stops there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gptq_cli.checkpoint.destination import Destination
from gptq_cli.checkpoint.fingerprint import Fingerprint, bits_asked
from gptq_cli.checkpoint.held_signals import held_signals
from gptq_cli.checkpoint.journal import Journal
from gptq_cli.checkpoint.kept_states import StatesOnDisk
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.config import QuantizeJob
from gptq_cli.devices.accelerators import read_memory
from gptq_cli.devices.host_memory import reset_peak_resident
from gptq_cli.engine.loop import LoopOptions
from gptq_cli.engine.opening import EngineRun
from gptq_cli.engine.run import quantize_model
from gptq_cli.errors import (
    GptqError,
    NonFinite,
    SourceChanged,
)
from gptq_cli.events import Observer, RunFinished, ShardWritten, ignore, phase
from gptq_cli.jobs.card import Card
from gptq_cli.jobs.checking import check
from gptq_cli.jobs.claiming import claimed
from gptq_cli.jobs.forecast import Forecast, against_plan
from gptq_cli.jobs.header import header
from gptq_cli.jobs.keeping import keeping
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
from gptq_cli.planning.time import NOTHING_DONE, Done, estimate, quick_estimate
from gptq_cli.planning.words import streaming_words
from gptq_cli.preflight.facts import Claim
from gptq_cli.preflight.report import map_report, own_settings, quantize_plan, time_shown
from gptq_cli.preflight.resolve import refusal
from gptq_cli.ranks.joining import Joined
from gptq_cli.ranks.team import ALONE, Team
from gptq_cli.results.card import HERE, CardMaker
from gptq_cli.results.document import document
from gptq_cli.results.map import MapReport
from gptq_cli.results.push import PushConfig
from gptq_cli.results.run import RunReport


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
    asked = _Asked(job, card, proof, push, time.perf_counter(), joined)
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


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a call of `quantize` asks for."""

    job: QuantizeJob
    card: CardMaker | None
    proof: LoadJob | None
    push: PushConfig | None
    started: float
    joined: Joined | None

    @property
    def name(self) -> str:
        """What the card calls the checkpoint."""
        return self.push.repo_id if self.push is not None else HERE

    @property
    def team(self) -> Team:
        """The ranks that work together."""
        return self.joined.team if self.joined is not None else ALONE

    @property
    def goes_on(self) -> bool:
        """Whether there is more to do once the checkpoint is in place."""
        return self.proof is not None or self.push is not None


def _quantize(
    asked: _Asked, claim: Claim, watcher: Watcher, tally: Tally
) -> tuple[RunReport, Skeleton, Card | None]:
    """The work up to the checkpoint in place: its report, its model, its card."""
    job = asked.job
    check_share(job, asked.team.size)
    checked = check(job, tally, claim, writes=True, proof=asked.proof, push=asked.push, joined=asked.joined)
    announce(checked.findings, tally, known=checked.announced)
    job = checked.job
    if checked.ran:
        tally.host_peak_bytes = reset_peak_resident()
    placement, schedule, tokens = checked.resolution.placement, checked.resolution.schedule, checked.tokens
    if not checked.findings.ok or placement is None or schedule is None or tokens is None:
        raise refusal(checked.findings)
    watcher.planned(placement, schedule, asked.team.size)
    if job.quantize.bits_per_weight is not None:
        raise GptqError(
            f"a budget of {job.quantize.bits_per_weight:g} bits was not spent", hint="give --bits"
        )
    destination = claim.destination
    if destination is None:
        raise GptqError(f"{job.out} could not be claimed", hint="give another --out")
    found = checked.unfinished
    if found is not None and not found.facts.continued:
        destination.start_over()
        found = None
    done = _done(found.journal) if found is not None and found.journal is not None else NOTHING_DONE
    expected = quick_estimate(
        checked.facts,
        checked.work,
        schedule,
        placement.main_device,
        done=done,
        shards=checked.skeleton.files.shards,
    )
    tally(
        header(job, checked, placement, schedule, tokens, expected, finished=done.blocks, joined=asked.joined)
    )
    job, given = replace(job, quantize=checked.work.quantize), job
    fingerprint = Fingerprint.of(job, checked.skeleton, tokens)
    devices = watched(placement)
    run = EngineRun(
        skeleton=checked.skeleton,
        placement=placement,
        schedule=schedule,
        config=job.quantize,
        options=LoopOptions(strict=job.strict, devices=devices, team=asked.team),
        states=StatesOnDisk(destination.gradients),
    )
    with (
        _nothing_kept_of_a_faulty_model(destination),
        _writer(job, checked.skeleton, claim, tally) as writer,
        keeping(
            found.journal if found is not None else None,
            fingerprint,
            asked=bits_asked(asked.job),
            writer=writer,
            destination=destination,
            skeleton=checked.skeleton,
            devices=tuple(str(device) for device in placement.devices),
            started=asked.started,
            observer=tally,
            warnings=lambda: tuple(watcher.warnings),
            team=asked.team,
        ) as keeper,
    ):
        watcher.kept = bool(keeper.finished)
        forecast = Forecast(
            facts=checked.facts,
            work=checked.work,
            schedule=schedule,
            device=placement.main_device,
            plans=checked.resolution.devices,
        )
        observer = against_plan(forecast, tally)
        asked.team.decided(
            lambda: Assignment(
                job=given,
                config=job.quantize,
                placement=placement,
                schedule=schedule,
                tokens=tokens,
                fingerprint=fingerprint,
                revision=checked.skeleton.files.revision,
                finished=keeper.finished,
            )
        )
        if asked.joined is not None:
            run = replace(run, shards=send_files(asked.joined, checked.skeleton, tally))
        quantized = quantize_model(run, tokens.input_ids, writer.add_packed, observer, keeper)
        ranks = account(asked.joined) if asked.joined is not None else ()
        with phase(tally, "save"):
            writer.copy_dense()
            if quantized.tuned is not None:
                writer.replace(quantized.tuned.tensors)
        tally.record(read_memory(devices))
        report = summarize(
            job=job,
            skeleton=checked.skeleton,
            tokens=tokens,
            schedule=schedule,
            devices=[str(device) for device in placement.devices],
            streaming=streaming_words(checked.facts, placement, schedule),
            predicted_peak_bytes=[
                (plan.device, plan.predicted_peak_bytes) for plan in checked.resolution.devices
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
            estimate=expected,
            tally=tally,
            kept=keeper,
            ranks=ranks,
            settings=settings_of(
                replace(job, quantize=replace(job.quantize, modules=given.quantize.modules)),
                revision=checked.skeleton.files.revision or job.model.revision,
                card=asked.card is not None,
                proof=asked.proof,
            ),
        )
        card = Card(asked.card, job, checked.skeleton, tally, asked.name) if asked.card is not None else None
        writer.complete(document(report), partial(card.files, report) if card else None)
        with held_signals() as stop_if_heard:  # one that comes now waits until the run is known to be done
            stop_if_heard()
            writer.put_in_place()
            if not asked.goes_on:
                tally(RunFinished(report))
    return report, checked.skeleton, card


def _done(journal: Journal) -> Done:
    """What the work that the job goes on with has finished."""
    held = journal.manifest
    return Done(blocks=len(held.blocks), gradients=held.gradients, tuned=held.tuning is not None)


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
