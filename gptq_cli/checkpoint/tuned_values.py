"""Tuned values in the journal: all of them are there before the first is written over an old one.

So a run that ended while it wrote them into the checkpoint's files goes on with writing them, whatever the
files hold by then.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from gptq_cli.checkpoint.journal import TUNED, FinishedTuning, Journal
from gptq_cli.checkpoint.snapshot import read_snapshot, write_snapshot
from gptq_cli.results.run import TuningReport


def with_tuned(journal: Journal, report: TuningReport, tensors: dict[str, Tensor]) -> FinishedTuning:
    """Write the values beside the journal; a manifest that names them makes them count. Raises `OSError`."""
    journal.folder.mkdir(exist_ok=True)
    part = write_snapshot(journal.folder / TUNED, tensors.items())
    return FinishedTuning(report=report, part=part)


def read_tuned(journal: Journal) -> tuple[TuningReport, dict[str, Tensor]] | None:
    """What the manifest names; None where it names nothing. Raises `JournalError`, and then the manifest does
    not name them any more."""
    tuning = journal.manifest.tuning
    if tuning is None:
        return None
    journal.manifest = replace(journal.manifest, tuning=None)
    stored = read_snapshot(journal.folder, tuning.part)
    journal.manifest = replace(journal.manifest, tuning=tuning)
    return tuning.report, {name: read() for name, read in stored.items()}
