"""A job checked: files, text, map and memory, before a weight is read.

Two things take the weights: text that the model is to write itself (`--calibration self`), and what fewer
bits cost (`--bits-per-weight`). Then everything else is checked first, and refused or announced; the model is
run; and the check is completed with the result, which decides whether unfinished work is of the same job.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gptq_cli.calibration import TokenBatches, open_tokenizer
from gptq_cli.calibration.batches import batches_by_source, mixed, own_batches
from gptq_cli.calibration.own_text import OwnText, TextStore, Wanted, row_bytes, rows_at_once
from gptq_cli.checkpoint.fingerprint import Fingerprint
from gptq_cli.checkpoint.layout import plan_checkpoint
from gptq_cli.config import CalibrationConfig, QuantizeJob
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import CalibrationError, ModelError
from gptq_cli.events import Observer, Warned, phase
from gptq_cli.findings import Finding, PreflightReport
from gptq_cli.jobs.bit_store import BitStore
from gptq_cli.jobs.choosing import BitSearch
from gptq_cli.jobs.early import check_push
from gptq_cli.jobs.fetching import opening
from gptq_cli.jobs.proof import check_text
from gptq_cli.jobs.resuming import Found, command_of, find_work
from gptq_cli.jobs.steps import announce, placed, work_of
from gptq_cli.jobs.texts import about_windows
from gptq_cli.jobs.writing import calibration_wanted, check_can_write, text_store, write_first
from gptq_cli.load_job import LoadJob
from gptq_cli.model.describe import model_facts
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import Skeleton, open_skeleton
from gptq_cli.model.text_part import language_model
from gptq_cli.placement.placement import DeviceBudget
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import quantized_bytes
from gptq_cli.planning.rates import measure
from gptq_cli.planning.writing import writing_needs, writing_seconds
from gptq_cli.preflight.facts import Claim
from gptq_cli.preflight.resolve import Resolution
from gptq_cli.preflight.rules import calibration as rules_text
from gptq_cli.ranks.joining import Joined
from gptq_cli.results.bits import BitChoice
from gptq_cli.results.push import PushConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A job after preflight: everything the engine needs, and everything that was found."""

    job: QuantizeJob
    """As given, but a budget of bits became settings by module."""
    skeleton: Skeleton
    facts: ModelFacts
    work: Work
    budgets: tuple[DeviceBudget, ...]
    tokens: TokenBatches | None
    resolution: Resolution
    findings: PreflightReport
    unfinished: Found | None = None
    """What an earlier run with the same output had finished."""
    announced: frozenset[Finding] = frozenset()
    """Findings that were announced before the model was run."""
    ran: bool = False
    """The model was run for this: it wrote text, or what fewer bits cost was measured."""
    writing_seconds: float | None = None
    """An estimate of how long the model will write; None where there is nothing to write."""
    bits: BitChoice | None = None
    """How a budget of bits is spent; None without one."""
    measures: BitSearch | None = None
    """Where what fewer bits cost has yet to be measured: how."""

    def written_bytes(self) -> int:
        """Of all files with tensors, to the byte; of the tensors alone where the run is refused."""
        if not self.findings.ok:
            return quantized_bytes(self.facts, self.work.quantize)
        return plan_checkpoint(self.skeleton, self.work.quantize, self.job.max_shard_bytes).size_bytes


def check(
    job: QuantizeJob,
    observer: Observer,
    claim: Claim | None = None,
    *,
    goes_on: bool = True,
    writes: bool = False,
    proof: LoadJob | None = None,
    push: PushConfig | None = None,
    joined: Joined | None = None,
    processes: int | None = None,
) -> Checked:
    """Open the headers of the files, cut the calibration text, resolve the map, and collect every finding.

    `goes_on`: what an earlier run with the same output had finished is of interest. `writes`: where the model
    has to be run for the check and nothing stands against the job, it is; the findings are announced before.
    `joined`: the ranks that will work together; `processes`: as many are planned.
    """
    with opening(job.model, observer) as files:
        opened = open_skeleton(files, job.model)
        search = BitSearch.of(job, opened)
        skeleton = opened if search is not None else select_linears(opened, job.quantize)
        facts = search.facts if search is not None else model_facts(skeleton)
    with phase(observer, "calibration") as words:
        texts, text_findings = _texts(job, skeleton, facts, text_store(observer))
        tokens = texts.tokens if texts is not None else None
        if tokens is not None:
            words.append(f"{tokens.samples} x {tokens.seq_len} tokens of {tokens.source}")
    text_findings += check_push(push)
    if proof is not None and texts is not None:
        text_findings += check_text(job, proof, skeleton, facts, observer)
    store = BitStore(lambda message, hint: observer(Warned(message, hint)))
    known = _Known(skeleton, facts, text_findings, claim, joined, processes, goes_on, search, store)
    checked = _completed(job, known, tokens)
    if texts is not None and texts.wanted is not None and texts.own is None:
        checked = _with_writing(job, checked, texts.wanted)
    elif checked.measures is None:
        return checked
    placement, schedule = checked.resolution.placement, checked.resolution.schedule
    if not (writes and checked.findings.ok and placement is not None and schedule is not None):
        return checked
    announce(checked.findings, observer)
    if tokens is None and texts is not None and texts.wanted is not None:
        own = write_first(texts.wanted, skeleton, placement, texts.store, observer, command_of(job))
        tokens = replace(texts, own=own).tokens
    if search is not None and tokens is not None and store.find(search.wanted(tokens)) is None:
        store.keep(search.wanted(tokens), search.measure(tokens, placement, schedule, observer))
    complete = _completed(job, known, tokens)
    return replace(complete, announced=frozenset(checked.findings.findings), ran=True)


@dataclass(frozen=True, slots=True)
class _Known:
    """What does not depend on the tokens."""

    skeleton: Skeleton
    facts: ModelFacts
    findings: PreflightReport
    """About the texts and the upload."""
    claim: Claim | None
    joined: Joined | None
    processes: int | None
    goes_on: bool
    search: BitSearch | None
    store: BitStore


def _completed(job: QuantizeJob, known: _Known, tokens: TokenBatches | None) -> Checked:
    """The rest of the check: the bits, unfinished work, the map, and all findings."""
    skeleton, facts, search, given = known.skeleton, known.facts, known.search, job
    bits, measures = None, None
    if search is not None:
        measured = known.store.find(search.wanted(tokens)) if tokens is not None else None
        spent = search.choose(measured)
        bits, measures = search.choice(spent, measured, tokens), search if measured is None else None
        job = replace(job, quantize=search.config_of(spent))
        skeleton = select_linears(skeleton, job.quantize)
        facts = model_facts(skeleton)
    known_tokens = tokens if measures is None else None  # until then no codes are decided
    ranks = known.processes if known.joined is None else known.joined.launch.size
    work = work_of(job, facts, ranks or 0)
    same = replace(job, quantize=work.quantize)
    unfinished = (
        find_work(same, given, lambda: Fingerprint.of(same, skeleton, known_tokens) if known_tokens else None)
        if known.goes_on
        else None
    )
    kept = unfinished.facts if unfinished is not None else None
    budgets, resolution, findings = placed(
        job, skeleton, facts, known.claim, kept, known.joined, known.processes
    )
    about_bits = PreflightReport()
    if search is not None:
        about_bits, findings = search.findings, search.others(findings)
    if measures is not None:
        about_bits += measures.needs(job, resolution)
    return Checked(
        job=job,
        skeleton=skeleton,
        facts=facts,
        work=work,
        unfinished=unfinished,
        budgets=budgets,
        tokens=tokens,
        resolution=resolution,
        findings=known.findings + about_bits + findings,
        bits=bits,
        measures=measures,
    )


@dataclass(frozen=True, slots=True)
class _Texts:
    """The windows of a job, source by source."""

    data: CalibrationConfig
    parts: tuple[TokenBatches | None, ...]
    """None: what the model writes."""
    store: TextStore
    wanted: Wanted | None
    """What it is to write; None where nothing."""
    own: OwnText | None
    """What it wrote, where that is known."""
    vocab_size: int | None

    @property
    def tokens(self) -> TokenBatches | None:
        """All windows; None where the model has still to write."""
        if self.wanted is not None and self.own is None:
            return None
        own = [own_batches(self.own, self.data, self.vocab_size)] if self.wanted is not None else []
        return mixed([part or own[0] for part in self.parts])


def _texts(
    job: QuantizeJob, skeleton: Skeleton, facts: ModelFacts, store: TextStore
) -> tuple[_Texts | None, PreflightReport]:
    """The calibration windows, or a finding that says why there are none."""
    if any(problem.kind in ("special-file", "file-too-large") for problem in skeleton.problems):
        return None, PreflightReport()  # the tokenizer's loader would open it
    data, vocab_size = job.calibration, facts.vocab_size or None
    try:
        tokenizer = open_tokenizer(skeleton.files.directory, job.model.trust_remote_code)
        parts = batches_by_source(tokenizer, data, vocab_size=vocab_size)
        wanted = own = None
        if data.own_windows:
            check_can_write(skeleton, tokenizer, held_out=False)
            wanted = calibration_wanted(skeleton, data)
            own = store.find(wanted)
        texts = _Texts(data, parts, store, wanted, own, vocab_size)
        texts.tokens  # noqa: B018  # raises where the tokens are not the model's
    except (CalibrationError, ModelError) as error:
        if is_out_of_memory(error):
            raise
        case = rules_text.TextCase(model=job.model.model, source=data.words, failure=error)
        return None, PreflightReport((*rules_text.tokenizer(case), *rules_text.calibration_text(case)))
    found = tuple(finding for one in parts if one is not None for finding in about_windows(one))
    return texts, PreflightReport(found)


def _with_writing(job: QuantizeJob, checked: Checked, wanted: Wanted) -> Checked:
    """The same with what writing takes: findings where there is no memory for it, or it takes long."""
    placement = checked.resolution.placement
    if placement is None:
        return checked
    main, model = placement.main_device, language_model(checked.skeleton.model)
    rows = min(wanted.rows, rows_at_once(model, wanted.row_tokens, main.kind))
    needs = writing_needs(
        checked.facts,
        checked.resolution.devices,
        main,
        rows * row_bytes(model, wanted.row_tokens),
        rows,
    )
    seconds = None
    if job.devices is None and checked.findings.ok:
        speed = measure(main, checked.facts.dtype, job.quantize, attempts=2, min_seconds=0.03)
        seconds = writing_seconds(checked.facts, wanted.tokens, rows, main, speed)
    case = rules_text.WritingCase(tokens=wanted.tokens, device=main, needs=needs, seconds=seconds)
    found = (*rules_text.own_text_memory(case), *rules_text.own_text_time(case))
    return replace(checked, findings=checked.findings + PreflightReport(found), writing_seconds=seconds)
