"""`gptq quantize` in several processes: rank 0 does what one process does, the others follow.

Rank 0 checks, plans, claims the output, shows, writes and keeps. When all is settled it tells the others what
to do (`Assignment`), and from then on all ranks run the same engine side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gptq_cli.calibration import TokenBatches
from gptq_cli.checkpoint.fingerprint import Fingerprint
from gptq_cli.config import InspectJob, QuantizeConfig, QuantizeJob
from gptq_cli.engine.loop import LoopOptions
from gptq_cli.engine.opening import EngineRun
from gptq_cli.engine.run import quantize_model
from gptq_cli.engine.together import FollowingKeeper
from gptq_cli.errors import ConfigError, ModelError
from gptq_cli.events import ignore
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.jobs.shared_files import seen_files
from gptq_cli.jobs.steps import watched
from gptq_cli.jobs.watching import Watcher, out_of_memory_while
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import LinearInfo, open_skeleton
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule
from gptq_cli.ranks.joining import Joined, Member, joined
from gptq_cli.ranks.launch import Launch
from gptq_cli.ranks.leaves import idle_ranks
from gptq_cli.ranks.team import decided_elsewhere
from gptq_cli.results.run import BlockReport, RankReport

MAX_RANKS_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What rank 0 tells the others."""

    job: QuantizeJob
    config: QuantizeConfig
    """With a number for the group size."""
    placement: Placement
    schedule: Schedule
    tokens: TokenBatches
    fingerprint: Fingerprint
    revision: str | None
    """The commit of a model on the Hub; None: rank 0 has a directory."""
    finished: tuple[BlockReport, ...]
    """Blocks that an earlier run finished."""


def check_share(job: QuantizeJob | InspectJob, ranks: int) -> None:
    """Raise `ConfigError` where there are too few samples for every one of so many ranks to have one, or
    where the job is one for a single process."""
    if ranks > 1 and job.quantize.tune_epochs:
        raise ConfigError(
            f"tune_epochs is {job.quantize.tune_epochs}; allowed with {ranks} processes: 0, because one "
            "process tunes",
            hint="--tune-epochs 0 (recipe max is then recipe best), or one process",
        )
    samples = job.calibration.samples
    pairs = job.quantize.paired_samples(samples, job.calibration.seq_len)
    if ranks > 1 and (idle := idle_ranks(pairs, samples - pairs, ranks)):
        raise ConfigError(
            f"samples is {samples}, which leaves {idle} of {ranks} processes without work",
            hint=f"--samples {4 * ranks}, or fewer processes",
        )


def on_cpu(job: QuantizeJob) -> bool:
    """Whether the device map names no accelerator."""
    rules = job.device_map.rules
    return bool(rules) and all(rule.device == CPU for rule in rules)


def account(own: Joined) -> tuple[RankReport, ...]:
    """What every rank has sent, and how long it has waited; () where there is only one. All ranks ask at the
    same point."""
    if own.launch.size == 1:
        return ()
    member, traffic = own.members[own.launch.rank], own.team.traffic
    report = RankReport(
        rank=member.rank,
        host=member.host,
        device=member.device,
        sent_bytes=traffic.sent_bytes,
        sum_bytes=traffic.sum_bytes,
        code_bytes=traffic.code_bytes,
        factor_bytes=traffic.factor_bytes,
        waited_seconds=traffic.waited_seconds,
    )
    return tuple(own.team.gathered(report))


def ranks_words(members: Sequence[Member]) -> str:
    """`3; rank 0 on a: cuda:0; rank 1 on a: cuda:1; …`: who works where; of many, machine by machine."""
    if len(members) <= MAX_RANKS_NAMED:
        return "; ".join([str(len(members)), *(f"{one}: {one.device}" for one in members)])
    hosts = Counter(one.host for one in members)
    return "; ".join([str(len(members)), *(f"{count} on {host}" for host, count in hosts.items())])


def follow(job: QuantizeJob, launch: Launch, *, came: Callable[[], None], heard: Callable[[], None]) -> None:
    """What every rank but the first does. `came` is called when rank 0 can be told what goes wrong here,
    `heard` when all ranks have met.

    Raises what `quantize_model` raises, `ModelError` where the model is not the one that rank 0 has, and what
    ended rank 0.
    """
    watcher = Watcher(ignore, job=job)
    with joined(launch, job.command_line, on_cpu=on_cpu(job), came=came) as own:
        heard()
        with out_of_memory_while(watcher, "quantize"):
            told: Assignment = own.team.decided(decided_elsewhere)
            _work(own, told, watcher)


def _work(own: Joined, told: Assignment, watcher: Watcher) -> None:
    job = replace(told.job, quantize=told.config)
    with seen_files(own.team, job.model, told.revision) as seen:
        skeleton = select_linears(open_skeleton(seen.files, job.model), told.job.quantize)
        if seen.shards is None:
            _check_same(told.fingerprint, Fingerprint.of(job, skeleton, told.tokens), job)
        placement = _placement_on(told.placement, own.device)
        run = EngineRun(
            skeleton=skeleton,
            placement=placement,
            schedule=_schedule_on(told.schedule, own.device),
            config=told.config,
            options=LoopOptions(strict=job.strict, devices=watched(placement), team=own.team),
            shards=seen.shards,
        )
        watcher.planned(run.placement, run.schedule, own.team.size)
        watcher.kept = bool(told.finished)
        keeper = FollowingKeeper(own.team, told.finished)
        quantize_model(run, told.tokens.input_ids, _written_elsewhere, watcher, keeper)
    account(own)


def _check_same(first: Fingerprint, here: Fingerprint, job: QuantizeJob) -> None:
    differences = first.differences(here)
    if differences:
        raise ModelError(
            f"{job.model.model} is another model here than on rank 0: {differences[0]}",
            hint="all machines need the same files; where there are none, rank 0 sends its own",
        )


def _placement_on(placement: Placement, own: Device) -> Placement:
    """Rank 0's placement with this rank's accelerator in the place of its own."""
    entries = tuple(replace(entry, device=_in_place_of(entry.device, own)) for entry in placement.entries)
    return Placement(entries, _in_place_of(placement.main_device, own), placement.reason)


def _schedule_on(schedule: Schedule, own: Device) -> Schedule:
    head = schedule.head_device
    return replace(
        schedule,
        head_device=None if head is None else _in_place_of(head, own),
        blocks=tuple(
            replace(
                block,
                execution_device=_in_place_of(block.execution_device, own),  # the cpu is that of each
            )
            for block in schedule.blocks
        ),
    )


def _in_place_of(device: Device, own: Device) -> Device:
    return own if device.is_accelerator else device


def _written_elsewhere(linear: LinearInfo, packed: PackedTensors) -> None:
    """The store of a rank that follows: rank 0 writes."""
