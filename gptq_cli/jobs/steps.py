"""Steps that several commands take: place and check, announce what was found, say what will be done."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from socket import gethostname

from gptq_cli.checkpoint.declared import modules_in_block
from gptq_cli.config import InspectJob, QuantizeJob
from gptq_cli.devices.accelerators import present_devices
from gptq_cli.events import FindingRaised, Observer
from gptq_cli.findings import Finding, PreflightReport
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.readable import unreadable_files
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import DeviceBudget, Placement, RankPlace, least_of, places_for
from gptq_cli.placement.schedule import ReplayReason, Schedule
from gptq_cli.planning.cases import UnfinishedWork, Work
from gptq_cli.planning.rates import MachineRates, rates
from gptq_cli.preflight.facts import Claim, capabilities, environment_facts, output_facts
from gptq_cli.preflight.registry import check_quantize
from gptq_cli.preflight.resolve import Resolution, resolve
from gptq_cli.ranks.joining import Joined
from gptq_cli.wording import number_of


def work_of(job: QuantizeJob | InspectJob, facts: ModelFacts, ranks: int = 0) -> Work:
    """What is to be done with a model. `ranks`: so many share it; 0 where there is no launcher."""
    return Work(job.quantize, job.calibration, ranks).on(facts)


def devices_and_places(
    job: QuantizeJob | InspectJob, joined: Joined | None, processes: int | None
) -> tuple[tuple[DeviceBudget, ...], tuple[RankPlace, ...]]:
    """The devices to plan for, and where the ranks work: those that have `joined`, or as many `processes` on
    machines like this one, or like that of --devices. Without either, no ranks."""
    if joined is not None:
        return job.devices or joined.budgets, joined.places
    budgets = job.devices or present_devices()
    if processes is None:
        return budgets, ()
    places = places_for(processes, budgets, "" if job.devices else gethostname())
    return least_of(places), places


def placed(
    job: QuantizeJob | InspectJob,
    skeleton: Skeleton,
    facts: ModelFacts,
    claim: Claim | None = None,
    unfinished: UnfinishedWork | None = None,
    joined: Joined | None = None,
    processes: int | None = None,
) -> tuple[tuple[DeviceBudget, ...], Resolution, PreflightReport]:
    """The devices, the map resolved on them, and the findings about both and about the job. `joined`: the
    ranks that work together, each on a device of its own; `processes`: as many are planned."""
    budgets, places = devices_and_places(job, joined, processes)
    asked = Work(job.quantize, job.calibration, len(places))
    work = asked.on(facts)
    environment = environment_facts()
    if places:
        environment = replace(environment, local_rank=None)
    resolution = resolve(
        job.device_map,
        facts,
        budgets,
        max_memory=job.max_memory,
        work=work,
        environment=environment,
        given=job.devices is not None,
        places=places,
    )
    devices = resolution.placement.devices if resolution.placement else ()
    source = skeleton.files.directory
    problems, output, overwrite = skeleton.problems, None, False
    if isinstance(job, QuantizeJob):
        problems = (*problems, *unreadable_files(source, code=job.model.trust_remote_code))
        output = output_facts(job.out, source, claim, work=unfinished, resume=job.resume)
        overwrite = job.overwrite
    findings = check_quantize(
        replace(facts, listed=bool(modules_in_block(skeleton))),
        asked,
        problems=problems,
        output=output,
        overwrite=overwrite,
        devices=devices,
        capabilities=() if job.devices else capabilities(devices),
        targets=job.targets,
        tp=job.tp,
        asked=job.asked if isinstance(job, InspectJob) else None,
    )
    return budgets, resolution, resolution.report + findings


def rates_for(
    job: QuantizeJob | InspectJob,
    skeleton: Skeleton,
    facts: ModelFacts,
    resolution: Resolution,
    *,
    thorough: bool,
) -> MachineRates | None:
    """What a time is counted from; None where the job is refused, or its devices are given without a card."""
    placement = resolution.placement
    if not resolution.report.ok or placement is None or resolution.schedule is None:
        return None
    cards = {budget.device: budget.card for budget in job.devices or ()}
    card = cards.get(placement.main_device, "")
    if job.devices is not None and not card:
        return None
    work = Work(job.quantize, job.calibration).on(facts)
    shards = skeleton.files.shards
    return rates(placement.main_device, facts, work, card=card, thorough=thorough, shards=shards)


def announce(report: PreflightReport, observer: Observer, *, known: Collection[Finding] = ()) -> None:
    """One event per finding that is not `known`, errors first."""
    for finding in report.ordered():
        if finding not in known:
            observer(FindingRaised(finding))


def watched(placement: Placement) -> tuple[Device, ...]:
    """The devices whose memory is shown: those of the placement, and the CPU, which always does something."""
    return tuple(dict.fromkeys((*placement.devices, CPU)))


_WHY_SEVERAL: dict[ReplayReason, str] = {
    "memory": "to save memory",
    "experts": "because of experts",
    "not-sequential": "because of --no-true-sequential",
}


def passes_words(schedule: Schedule) -> str:
    """How often the calibration text goes through a block, and how much of it at a time."""
    several: dict[ReplayReason, int] = {}
    for block in schedule.blocks:
        if block.replayed is not None:
            several[block.replayed] = several.get(block.replayed, 0) + 1
    total, count = len(schedule.blocks), schedule.micro_batch_samples
    if sum(several.values()) == total and len(several) == 1:
        words = f"several per block {_WHY_SEVERAL[next(iter(several))]}"
    else:
        parts = [f"several in {n} of {total} {_WHY_SEVERAL[why]}" for why, n in several.items()]
        words = ", ".join(["one per block", *parts])
    return f"{words}, {number_of(count, 'sample')} at a time"
