"""Unfinished work at a destination: finding it, comparing it with the job, and what to say when a run ends.

A run that ends before its checkpoint is in place leaves its working folder where a block was finished, or the
gradients were taken. The same command run again finds it there, and goes on where the fingerprints are equal.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from gptq_cli.checkpoint.fingerprint import Fingerprint, bits_asked, in_words_of_the_job
from gptq_cli.checkpoint.journal import Journal, JournalError, Manifest
from gptq_cli.checkpoint.place import Place
from gptq_cli.config import QuantizeJob
from gptq_cli.errors import (
    DestinationBusy,
    GptqError,
    Interrupted,
    LinearLost,
    NotPositiveDefinite,
    PreflightRefused,
    UsageError,
)
from gptq_cli.planning.cases import UnfinishedWork
from gptq_cli.wording import all_of, duration_words


@dataclass(frozen=True, slots=True)
class Found:
    """Unfinished work: what the rules are told about it, and its journal where that can be read."""

    facts: UnfinishedWork
    journal: Journal | None


def find_work(
    job: QuantizeJob, given: QuantizeJob, fingerprint: Callable[[], Fingerprint | None]
) -> Found | None:
    """The unfinished work at the job's destination; None without any. Writes nothing.

    `given`: the job before a budget of bits was spent. `fingerprint` gives that of the job; None where it has
    none because its text is not sound.
    """
    place = _place(job)
    try:
        place.check_free()
    except DestinationBusy:
        return None  # that run is not unfinished, it works
    if not place.has_work():
        return None
    folder = str(place.folder)
    try:
        journal = Journal.read(place.journal)
    except JournalError as error:
        return Found(UnfinishedWork(folder=folder, resume=job.resume, problem=str(error)), None)
    manifest = journal.manifest
    own = fingerprint()
    differences = manifest.fingerprint.differences(own) if own is not None else ()
    if manifest.asked is not None:
        differences = in_words_of_the_job(differences, manifest.asked.differences(bits_asked(given)))
    facts = UnfinishedWork(
        folder=folder,
        resume=job.resume,
        words=work_words(manifest),
        differences=tuple(str(one) for one in differences),
    )
    return Found(facts, journal)


def _place(job: QuantizeJob) -> Place:
    return Place.of(job.out.replace("\0", "?"))


def work_words(manifest: Manifest) -> str:
    """`blocks 0 to 17 of 32 from 2026-11-25 14:03, 41 min of work`."""
    done, total = len(manifest.blocks), manifest.total
    if done == 0:
        of = f"the gradients for {all_of(total, 'block')}"
    elif done == total:
        of = all_of(done, "block")
    else:
        of = f"{'block 0' if done == 1 else f'blocks 0 to {done - 1}'} of {total}"
    begun = manifest.starts[0].started if manifest.starts else datetime.now().astimezone().isoformat()
    spent = sum(start.seconds for start in manifest.starts)
    return f"{of} from {begun[:16].replace('T', ' ')}, {duration_words(spent)} of work"


def command_of(job: QuantizeJob) -> str:
    """The command to run again; for a caller of the Python API, in words."""
    return shlex.join(job.command_line) if job.command_line else "the same call"


@contextmanager
def continuing(job: QuantizeJob) -> Iterator[None]:
    """Say at the end of a run that fails or is interrupted what was kept, and how to go on.

    Raises `Interrupted` in place of `KeyboardInterrupt` where something was kept; adds to the hint of a
    `GptqError`.
    """
    try:
        yield
    except (UsageError, PreflightRefused):
        raise
    except KeyboardInterrupt as error:
        kept = _kept(job)
        if kept:
            raise Interrupted(f"interrupted; {kept}", hint=f"to go on: {command_of(job)}") from error
        raise
    except GptqError as error:
        kept = _kept(job)
        if kept:
            how = f"to go on: {command_of(job)}"
            if isinstance(error, (LinearLost, NotPositiveDefinite)):  # the same command would end alike
                how = f"to go on without --strict: {command_of(_not_strict(job))}"
            error.hint = "; ".join(filter(None, (error.hint, f"{kept}; {how}")))
        raise


def _not_strict(job: QuantizeJob) -> QuantizeJob:
    words = tuple(word for word in job.command_line if word != "--strict")
    return replace(job, command_line=words, strict=False)


def _kept(job: QuantizeJob) -> str:
    """What is kept of the run that has just ended; "" where nothing is."""
    place = _place(job)
    if not place.has_work():
        return ""
    try:
        return f"{work_words(Journal.read(place.journal).manifest)} are kept in {place.folder}"
    except JournalError:
        return ""
