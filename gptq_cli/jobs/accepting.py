"""The first half of `gptq quantize`: what a call asks for, and what is known of it before its work begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gptq_cli.calibration import TokenBatches
from gptq_cli.checkpoint.destination import Destination
from gptq_cli.checkpoint.journal import Journal
from gptq_cli.config import QuantizeJob
from gptq_cli.devices.host_memory import reset_peak_resident
from gptq_cli.errors import GptqError
from gptq_cli.jobs.checking import Checked, check
from gptq_cli.jobs.run_report import Tally
from gptq_cli.jobs.steps import announce
from gptq_cli.jobs.together import check_share
from gptq_cli.jobs.watching import Watcher
from gptq_cli.load_job import LoadJob
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.time import NOTHING_DONE, Done, Estimate, quick_estimate
from gptq_cli.preflight.facts import Claim
from gptq_cli.preflight.resolve import refusal
from gptq_cli.ranks.joining import Joined
from gptq_cli.ranks.team import ALONE, Team
from gptq_cli.results.card import HERE, CardMaker
from gptq_cli.results.push import PushConfig


@dataclass(frozen=True, slots=True)
class Asked:
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


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that passed preflight, and what is known before its work begins."""

    checked: Checked
    given: QuantizeJob
    """As asked for, but a budget of bits became settings by module."""
    job: QuantizeJob
    """As it is worked: with the settings that the resolution led to."""
    placement: Placement
    schedule: Schedule
    tokens: TokenBatches
    destination: Destination
    journal: Journal | None
    """Of the unfinished run that this one goes on with."""
    done: Done
    expected: Estimate | None

    @property
    def skeleton(self) -> Skeleton:
        return self.checked.skeleton


def accepted(asked: Asked, claim: Claim, watcher: Watcher, tally: Tally) -> Accepted:
    """Check the job and announce what was found. Raises `PreflightRefused`; then nothing was written."""
    check_share(asked.job, asked.team.size)
    checked = check(
        asked.job, tally, claim, writes=True, proof=asked.proof, push=asked.push, joined=asked.joined
    )
    announce(checked.findings, tally, known=checked.announced)
    given = checked.job
    if checked.ran:
        tally.host_peak_bytes = reset_peak_resident()
    placement, schedule, tokens = checked.resolution.placement, checked.resolution.schedule, checked.tokens
    if not checked.findings.ok or placement is None or schedule is None or tokens is None:
        raise refusal(checked.findings)
    watcher.planned(placement, schedule, asked.team.size)
    if given.quantize.bits_per_weight is not None:
        raise GptqError(
            f"a budget of {given.quantize.bits_per_weight:g} bits was not spent", hint="give --bits"
        )
    destination = claim.destination
    if destination is None:
        raise GptqError(f"{given.out} could not be claimed", hint="give another --out")
    found = checked.unfinished
    if found is not None and not found.facts.continued:
        destination.start_over()
        found = None
    journal = found.journal if found is not None else None
    done = _done(journal) if journal is not None else NOTHING_DONE
    return Accepted(
        checked=checked,
        given=given,
        job=replace(given, quantize=checked.work.quantize),
        placement=placement,
        schedule=schedule,
        tokens=tokens,
        destination=destination,
        journal=journal,
        done=done,
        expected=quick_estimate(
            checked.facts,
            checked.work,
            schedule,
            placement.main_device,
            done=done,
            shards=checked.skeleton.files.shards,
        ),
    )


def _done(journal: Journal) -> Done:
    """What the work that the job goes on with has finished."""
    held = journal.manifest
    return Done(blocks=len(held.blocks), gradients=held.gradients, tuned=held.tuning is not None)
