"""The preflight of `gptq quantize`: everything that can be known before a weight is read, gathered once.

It ends with a list of findings and never with an exception of its own, so that a plan, a run and a trial say
the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gptq_cli.calibration import TokenBatches, make_batches, open_tokenizer
from gptq_cli.checkpoint.fingerprint import Fingerprint
from gptq_cli.config import QuantizeJob
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import CalibrationError, ModelError
from gptq_cli.events import Observer, phase
from gptq_cli.findings import PreflightReport
from gptq_cli.jobs.early import check_push
from gptq_cli.jobs.proof import check_text
from gptq_cli.jobs.resuming import Found, find_work
from gptq_cli.jobs.steps import placed
from gptq_cli.load_job import LoadJob
from gptq_cli.model.describe import model_facts
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.find import find_model
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import Skeleton, open_skeleton
from gptq_cli.placement.placement import DeviceBudget
from gptq_cli.planning.cases import Work
from gptq_cli.preflight.facts import Claim
from gptq_cli.preflight.resolve import Resolution
from gptq_cli.preflight.rules import calibration as rules_text
from gptq_cli.ranks.joining import Joined
from gptq_cli.results.push import PushConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A job after preflight: everything the engine needs, and everything that was found."""

    skeleton: Skeleton
    facts: ModelFacts
    work: Work
    budgets: tuple[DeviceBudget, ...]
    tokens: TokenBatches | None
    resolution: Resolution
    findings: PreflightReport
    unfinished: Found | None = None
    """What an earlier run with the same output had finished."""


def check(
    job: QuantizeJob,
    observer: Observer,
    claim: Claim | None = None,
    *,
    goes_on: bool = True,
    proof: LoadJob | None = None,
    push: PushConfig | None = None,
    joined: Joined | None = None,
) -> Checked:
    """Open the headers of the files, cut the calibration text, resolve the map, and collect every finding.

    `goes_on`: what an earlier run with the same output had finished is of interest. `joined`: the ranks that
    will work together.
    """
    with phase(observer, "open"):
        skeleton = select_linears(open_skeleton(find_model(job.model), job.model), job.quantize)
        facts = model_facts(skeleton)
    with phase(observer, "calibration") as words:
        tokens, text_findings = _tokens(job, skeleton, facts)
        if tokens is not None:
            words.append(f"{tokens.samples} x {tokens.seq_len} tokens of {tokens.source}")
    text_findings += check_push(push)
    if proof is not None and tokens is not None:
        text_findings += check_text(job, proof, skeleton, facts, observer)
    work = Work(job.quantize, job.calibration).on(facts)
    same = replace(job, quantize=work.quantize)
    unfinished = (
        find_work(same, lambda: Fingerprint.of(same, skeleton, tokens) if tokens else None)
        if goes_on
        else None
    )
    known = unfinished.facts if unfinished is not None else None
    budgets, resolution, findings = placed(job, skeleton, facts, claim, known, joined)
    return Checked(
        skeleton=skeleton,
        facts=facts,
        work=work,
        unfinished=unfinished,
        budgets=budgets,
        tokens=tokens,
        resolution=resolution,
        findings=text_findings + findings,
    )


def _tokens(
    job: QuantizeJob, skeleton: Skeleton, facts: ModelFacts
) -> tuple[TokenBatches | None, PreflightReport]:
    """The calibration windows, or a finding that says why there are none."""
    if any(problem.kind in ("special-file", "file-too-large") for problem in skeleton.problems):
        return None, PreflightReport()  # the tokenizer's loader would open it
    try:
        tokenizer = open_tokenizer(skeleton.files.directory, job.model.trust_remote_code)
        tokens = make_batches(tokenizer, job.calibration, vocab_size=facts.vocab_size or None)
        return tokens, PreflightReport()
    except (CalibrationError, ModelError) as error:
        if is_out_of_memory(error):
            raise
        case = rules_text.TextCase(model=job.model.model, source=job.calibration.words, failure=error)
        return None, PreflightReport((*rules_text.tokenizer(case), *rules_text.calibration_text(case)))
