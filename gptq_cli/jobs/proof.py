"""What `gptq quantize --eval` and its like do: the fresh checkpoint measured in the same command.

The text is cut before the work, so that a wrong name is found at once. Measured is what lies at the
destination, through the code of `gptq load`: the checkpoint is in place by then and stays, whatever the
figures are. They go into report.json and the model card.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gptq_cli.calibration import evaluation_windows, open_tokenizer
from gptq_cli.checkpoint.amend import amend
from gptq_cli.config import QuantizeJob
from gptq_cli.devices.accelerators import flush
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import (
    CalibrationError,
    GptqError,
    Interrupted,
    ModelError,
    OutOfDeviceMemory,
    PreflightRefused,
    QualityGateFailed,
)
from gptq_cli.evaluation.tasks import open_tasks
from gptq_cli.events import Observer, Warned, phase
from gptq_cli.files import reason
from gptq_cli.findings import PreflightReport
from gptq_cli.jobs.card import Card
from gptq_cli.jobs.loading import load
from gptq_cli.jobs.writing import check_can_write
from gptq_cli.load_job import LoadJob
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.positions import positions_of
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.preflight.rules import calibration as rules_text
from gptq_cli.results.document import document
from gptq_cli.results.load import LoadReport
from gptq_cli.results.run import RunReport
from gptq_cli.text_sources import OWN_TEXT


def fitted(proof: LoadJob, skeleton: Skeleton) -> LoadJob:
    """The same with windows of as many tokens as the model has positions, where it has fewer."""
    positions = positions_of(skeleton.model, skeleton.config)
    return proof if positions is None else replace(proof, seq_len=min(proof.seq_len, positions.tokens))


def check_text(
    job: QuantizeJob, proof: LoadJob, skeleton: Skeleton, facts: ModelFacts, observer: Observer
) -> PreflightReport:
    """A finding where the text to measure on cannot be read, or is too short.

    Raises `ConfigError` where a task cannot be opened.
    """
    if proof.tasks is not None:
        open_tasks(proof.tasks)
    if proof.text is None:
        return PreflightReport()
    fits = fitted(proof, skeleton)
    try:
        with phase(observer, "calibration"):
            tokenizer = open_tokenizer(skeleton.files.directory, job.model.trust_remote_code)
            vocabulary = facts.vocab_size or None
            if proof.text == OWN_TEXT:
                check_can_write(skeleton, tokenizer, held_out=True)
            else:
                evaluation_windows(tokenizer, proof.text, fits.seq_len, fits.windows, vocab_size=vocabulary)
    except (CalibrationError, ModelError) as error:
        if is_out_of_memory(error):
            raise
        case = rules_text.TextCase(model=job.model.model, source=proof.text, failure=error)
        return PreflightReport(tuple(rules_text.evaluation_text(case)))
    return PreflightReport()


def prove(
    report: RunReport, proof: LoadJob, skeleton: Skeleton, card: Card | None, observer: Observer
) -> RunReport:
    """The report with what was measured of its checkpoint, which is amended by it. A failed gate is data.

    Raises `QualityGateFailed` where it could not be measured, `OutOfDeviceMemory`, `Interrupted`.
    """
    flush(())
    dense = None if proof.against is None else str(skeleton.files.directory)  # the files that were quantized
    with _complete_anyway(proof):
        measured = load(replace(fitted(proof, skeleton), against=dense), observer)
    assert isinstance(measured, LoadReport)  # neither --verify nor --target alone was asked for
    if measured.against is not None:
        measured = replace(measured, against=skeleton.files.source)
    report = replace(
        report, proof=measured, warnings=tuple(dict.fromkeys((*report.warnings, *measured.warnings)))
    )
    texts = {"report.json": json.dumps(document(report), indent=2) + "\n"}
    directory = Path(proof.path)
    if card is not None:
        texts |= card.files(report, directory)
    try:
        amend(directory, texts)
    except OSError as error:
        warned = Warned(
            f"what was measured could not be written into {directory}: {reason(error)}",
            "the checkpoint is complete; the figures are in the result of this command",
        )
        observer(warned)
        return replace(report, warnings=(*report.warnings, warned.message))
    return report


@contextmanager
def _complete_anyway(proof: LoadJob) -> Iterator[None]:
    """Say of an error or an interruption that the checkpoint is there, and how to measure it later."""
    done = f"the checkpoint {proof.path} is complete"
    again = f"to measure it: {shlex.join(_words(proof))}"
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted while it was measured; {done}", hint=again) from error
    except GptqError as error:
        refused = isinstance(error, PreflightRefused)
        why = "; ".join(error.report.lines) if isinstance(error, PreflightRefused) else error.message
        hint = again if refused or not error.hint else f"{error.hint}; {again}"
        kind = OutOfDeviceMemory if isinstance(error, OutOfDeviceMemory) else QualityGateFailed
        raise kind(f"{done}, but it could not be measured: {why}", hint=hint) from error


def _words(proof: LoadJob) -> list[str]:
    """The command that measures the same of a finished checkpoint."""
    given: dict[str, object] = {
        "--eval": proof.evaluate,
        "--against": proof.against,
        "--max-kl": proof.max_kl,
        "--max-perplexity": proof.max_perplexity,
    }
    tasks = proof.tasks
    if tasks is not None:
        given |= {
            "--tasks": ",".join(tasks.names),
            "--task-dir": tasks.directory,
            "--task-limit": tasks.limit,
            "--shots": tasks.shots,
        }
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    for name, least in tasks.min_scores if tasks is not None else ():
        words += ["--min-score", f"{name}={least:g}"]
    return ["gptq", "load", proof.path, *words, *(["--bench"] if proof.bench else [])]
