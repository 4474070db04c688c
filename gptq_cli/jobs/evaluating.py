"""What `gptq load` measures of a loaded model: generated text, speed, distance from the dense model.

Each step takes a report and returns a more complete one. The dense model is planned from headers before any
weight is read, opened last, and kept only for the comparison: no figure of the quantized model includes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gptq_cli.calibration import TokenBatches, open_tokenizer
from gptq_cli.calibration.batches import own_windows
from gptq_cli.calibration.own_text import Wanted
from gptq_cli.checkpoint.checkpoint import QuantizedCheckpoint
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig
from gptq_cli.devices.accelerators import present_devices, read_memory
from gptq_cli.evaluation.divergence import check_comparable, compare
from gptq_cli.evaluation.generation import generate
from gptq_cli.evaluation.perplexity import perplexity
from gptq_cli.evaluation.speed import measure_speed
from gptq_cli.evaluation.tasks import Tasks, score
from gptq_cli.events import Observer, TextGenerated, counted, phase
from gptq_cli.findings import PreflightReport
from gptq_cli.inference.load import resident_bytes
from gptq_cli.jobs.fetching import fetched
from gptq_cli.jobs.steps import announce, watched
from gptq_cli.jobs.writing import text_store, write
from gptq_cli.load_job import LoadJob
from gptq_cli.model.describe import model_facts
from gptq_cli.model.positions import Positions
from gptq_cli.model.skeleton import Skeleton, open_skeleton
from gptq_cli.model.source import READABLE
from gptq_cli.model.text_part import language_model
from gptq_cli.model.weights import load_resident
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import DeviceBudget, Placement
from gptq_cli.planning.cases import JobCase, Work
from gptq_cli.preflight.facts import environment_facts
from gptq_cli.preflight.resolve import refusal, resolve
from gptq_cli.preflight.rules import model_files
from gptq_cli.results.load import Bench, Gate, LoadReport, Speed, TaskScore
from gptq_cli.rules import rules_in
from gptq_cli.wording import number_of

Scorer = Callable[[Any], tuple[TaskScore, ...]]
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 32, 5
"""For --bench; the tokens are fewer where the model has fewer positions."""


@dataclass(frozen=True, slots=True)
class DensePlan:
    """The dense model to compare with, and where it will go."""

    skeleton: Skeleton
    placement: Placement

    def tokenizer(self) -> Any:
        """The one beside its weights. Raises `ModelError`."""
        return open_tokenizer(self.skeleton.files.directory, self.skeleton.ref.trust_remote_code)


def plan_dense(
    job: LoadJob, checkpoint: QuantizedCheckpoint, placement: Placement, observer: Observer
) -> DensePlan | None:
    """Check from headers whether --against is comparable with the quantized model and fits beside it.

    It goes where the device map says, and without one to the quantized model's device. Raises `ModelError`,
    `CheckpointError` and `PreflightRefused`.
    """
    if job.against is None:
        return None
    ref = ModelRef(model=job.against, trust_remote_code=job.trust_remote_code, dtype=job.dtype)
    skeleton = open_skeleton(fetched(ref, observer), ref)
    check_comparable(checkpoint.model, skeleton.model)
    facts = model_facts(skeleton)
    case = JobCase(
        facts=facts,
        work=Work(QuantizeConfig(), CalibrationConfig()),
        problems=tuple(problem for problem in skeleton.problems if problem.kind not in READABLE),
    )
    files = PreflightReport(tuple(finding for rule in rules_in(model_files) for finding in rule(case)))
    resolution = resolve(
        job.device_map or DeviceMap.parse(str(placement.main_device)),
        facts,
        _left_by(placement),
        environment=environment_facts(),
    )
    found = files + PreflightReport(tuple(f for f in resolution.report.findings if f.level != "note"))
    announce(found, observer)
    if not found.ok or resolution.placement is None:
        raise refusal(found)
    return DensePlan(skeleton, resolution.placement)


def _left_by(placement: Placement) -> tuple[DeviceBudget, ...]:
    """The devices that are present, less the memory that the quantized model will take."""
    taken = dict(placement.size_bytes)
    return tuple(
        replace(budget, free_bytes=max(0, budget.free_bytes - taken.get(budget.device, 0)))
        for budget in present_devices()
    )


def generated(job: LoadJob, model: Any, tokenizer: Any, report: LoadReport, observer: Observer) -> LoadReport:
    """Continue --prompt; every piece of text is an event at once."""
    assert job.prompt is not None
    with phase(observer, "generate", job.max_new_tokens) as words:
        made = generate(
            model,
            tokenizer,
            job.prompt,
            job.max_new_tokens,
            lambda text, tokens: observer(TextGenerated(text, tokens)),
            raw=job.raw,
            sampling=job.sampling,
        )
        words.append(number_of(made.new_tokens, "token"))
    return replace(
        report,
        prompt=job.prompt,
        text=made.text,
        prompt_tokens=made.prompt_tokens,
        new_tokens=made.new_tokens,
        tokens_per_second=made.tokens_per_second,
    )


def timed(
    model: Any, placement: Placement, report: LoadReport, positions: Positions | None, observer: Observer
) -> LoadReport:
    """Prompt and decode speed, and the memory in use afterwards."""
    speed = _speed(model, positions, observer)
    memory = tuple((entry.device, entry.allocated_bytes) for entry in read_memory(watched(placement)))
    return replace(report, bench=Bench(speed=speed, weight_bytes=report.weight_bytes, memory=memory))


def _speed(model: Any, positions: Positions | None, observer: Observer) -> Speed:
    places = PROMPT_TOKENS + NEW_TOKENS if positions is None else positions.tokens
    new_tokens = max(1, min(NEW_TOKENS, places // 2))
    with phase(observer, "bench", ROUNDS):
        return measure_speed(
            model,
            prompt_tokens=max(1, min(PROMPT_TOKENS, places - new_tokens)),
            new_tokens=new_tokens,
            rounds=ROUNDS,
            on_round=counted(observer, "bench", uncounted=1),  # the warm-up
        )


def measured(
    model: Any,
    windows: TokenBatches | Wanted,
    dense: DensePlan | None,
    report: LoadReport,
    positions: Positions | None,
    observer: Observer,
    scorer: Scorer | None = None,
) -> LoadReport:
    """Perplexity, and against a dense model also KL, top-1 agreement, and its speed and scores on tasks where
    those of the quantized model were measured. `windows` that are `Wanted` are written by the dense model
    first."""
    if dense is None:
        assert isinstance(windows, TokenBatches)  # text is written by the dense model
        with phase(observer, "evaluate", windows.samples):
            advanced = counted(observer, "evaluate")
            found = perplexity(model, windows.input_ids, advanced, answers=windows.answers)
            return replace(_measured_on(report, windows), perplexity=found.value)
    with phase(observer, "dense"):
        other = language_model(load_resident(dense.skeleton, dense.placement))
    if isinstance(windows, Wanted):
        own = write(windows, other, dense.tokenizer(), text_store(observer), observer)
        windows = own_windows(own, int(other.get_input_embeddings().num_embeddings))
    report = _measured_on(report, windows)
    with phase(observer, "evaluate", windows.samples):
        advanced = counted(observer, "evaluate")
        agreement = compare(model, other, windows.input_ids, advanced, answers=windows.answers)
    bench = report.bench
    if bench is not None:
        bench = replace(
            bench,
            dense_speed=_speed(other, positions, observer),
            dense_weight_bytes=resident_bytes(other),
        )
    tasks = report.tasks if scorer is None else _beside(report.tasks, scorer(other))
    return replace(
        report,
        tasks=tasks,
        against=dense.skeleton.ref.model,
        perplexity=agreement.perplexity,
        agreement=agreement,
        bench=bench,
    )


def _beside(ours: tuple[TaskScore, ...], dense: tuple[TaskScore, ...]) -> tuple[TaskScore, ...]:
    """Scores with those of the dense model on the same tasks."""
    known = {(one.task, one.metric): one.value for one in dense}
    return tuple(replace(one, dense=known.get((one.task, one.metric))) for one in ours)


def scorer_of(tokenizer: Any, tasks: Tasks | None, positions: Positions | None, observer: Observer) -> Scorer:
    """A function from a model to its scores on `tasks`; without any, to nothing."""

    def scored(model: Any) -> tuple[TaskScore, ...]:
        if tasks is None:
            return ()
        with phase(observer, "tasks") as words:
            places = None if positions is None else positions.tokens
            found = score(model, tokenizer, tasks, places, counted(observer, "tasks"))
            words.append(", ".join(tasks.names))
        return found

    return scored


def _measured_on(report: LoadReport, windows: TokenBatches) -> LoadReport:
    return replace(
        report,
        windows=windows.samples,
        seq_len=windows.seq_len,
        text_source=windows.source,
        answers_only=windows.answers is not None,
    )


def apply_gates(job: LoadJob, report: LoadReport) -> LoadReport:
    """The report with every limit that was asked for checked against what was measured."""
    gates = []
    if job.max_kl is not None and report.agreement is not None:
        gates.append(Gate("max_kl", job.max_kl, report.agreement.kl))
    if job.max_perplexity is not None and report.perplexity is not None:
        gates.append(Gate("max_perplexity", job.max_perplexity, report.perplexity))
    main = {one.task: one.value for one in reversed(report.tasks)}  # a task's main metric comes first
    for name, least in job.tasks.min_scores if job.tasks is not None else ():
        gates.append(Gate("min_score", least, main.get(name, math.nan), name))
    return replace(report, gates=tuple(gates))
