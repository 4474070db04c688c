"""The steps of each command on one screen: open, check, work, report.

A job comes in as frozen data, events go out through the observer, a report comes back. What can be refused
without torch is refused before it is imported, which takes seconds; `about` never needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptq_cli.events import Observer, ignore, phase
from gptq_cli.jobs.watching import out_of_memory_in

if TYPE_CHECKING:
    from gptq_cli.config import InspectJob, QuantizeJob
    from gptq_cli.load_job import LoadJob
    from gptq_cli.ranks.launch import Launch
    from gptq_cli.results.card import CardMaker
    from gptq_cli.results.load import LoadReport, VerifyReport
    from gptq_cli.results.map import MapReport
    from gptq_cli.results.push import PushConfig, PushReport
    from gptq_cli.results.run import RunReport
    from gptq_cli.results.trial import TrialReport

__all__ = ["dry_run", "follow", "inspect_map", "load", "open_model", "push", "quantize", "trial"]


def quantize(
    job: QuantizeJob,
    observer: Observer = ignore,
    *,
    card: CardMaker | None = None,
    proof: LoadJob | None = None,
    push: PushConfig | None = None,
    launch: Launch | None = None,
    heard: Callable[[], None] = lambda: None,
) -> RunReport:
    """See `quantizing.quantize`. `launch`: this process leads those that a launcher started together; `heard`
    is called when all of several are there."""
    from gptq_cli.jobs.early import before_quantize, check_harness

    def check() -> None:
        before_quantize(job, observer, push)

    if proof is not None:
        check_harness(proof.tasks)
    if launch is None:
        module = _started("quantizing", check, observer)
        report: RunReport = module.quantize(job, observer, card=card, proof=proof, push=push)
        return report
    module = _started("quantizing", lambda: None, observer)
    from gptq_cli.jobs.together import on_cpu
    from gptq_cli.ranks.joining import joined

    with joined(launch, job.command_line, on_cpu=on_cpu(job)) as ranks:
        if launch.size > 1:
            heard()
        check()  # not earlier: the other ranks are told what it finds
        led: RunReport = module.quantize(job, observer, card=card, proof=proof, push=push, joined=ranks)
    return led


def follow(job: QuantizeJob, launch: Launch, *, came: Callable[[], None], heard: Callable[[], None]) -> None:
    """See `together.follow`."""
    _started("together", lambda: None, ignore).follow(job, launch, came=came, heard=heard)


def dry_run(
    job: QuantizeJob,
    observer: Observer = ignore,
    *,
    proof: LoadJob | None = None,
    push: PushConfig | None = None,
    processes: int | None = None,
) -> MapReport:
    """See `quantizing.dry_run`. Its result lists every finding, so only the model is looked for first."""
    from gptq_cli.jobs.early import before_plan, check_harness

    if proof is not None:
        check_harness(proof.tasks)
    module = _started("quantizing", lambda: before_plan(job), observer)
    report: MapReport = module.dry_run(job, observer, proof=proof, push=push, processes=processes)
    return report


def trial(job: QuantizeJob, blocks: int, observer: Observer = ignore) -> TrialReport:
    """See `some_blocks.trial`."""
    from gptq_cli.jobs.early import before_quantize

    module = _started("some_blocks", lambda: before_quantize(job, observer), observer)
    report: TrialReport = module.trial(job, blocks, observer)
    return report


def inspect_map(job: InspectJob, observer: Observer = ignore) -> MapReport:
    """See `inspecting.inspect_map`."""
    from gptq_cli.jobs.early import before_plan

    module = _started("inspecting", lambda: before_plan(job), observer)
    report: MapReport = module.inspect_map(job, observer)
    return report


def load(job: LoadJob, observer: Observer = ignore) -> LoadReport | VerifyReport:
    """See `loading.load`."""
    from gptq_cli.jobs.early import before_load

    module = _started("loading", lambda: before_load(job), observer)
    report: LoadReport | VerifyReport = module.load(job, observer)
    return report


def push(path: str, config: PushConfig, observer: Observer = ignore) -> PushReport:
    """See `pushing.push`."""
    from gptq_cli.jobs.early import before_push

    module = _started("pushing", lambda: before_push(path, config, observer), observer)
    report: PushReport = module.push(path, config, observer)
    return report


def open_model(job: LoadJob, observer: Observer = ignore) -> Any:
    """See `loading.open_model`."""
    from gptq_cli.jobs.early import before_load

    return _started("loading", lambda: before_load(job), observer).open_model(job, observer)


def _started(name: str, check: Callable[[], None], observer: Observer) -> Any:
    """The module with the steps, after `check`. A phase of its own where torch has yet to be imported."""
    if "torch" in sys.modules:
        return _checked(name, check)
    with phase(observer, "startup"):
        return _checked(name, check)


def _checked(name: str, check: Callable[[], None]) -> Any:
    with out_of_memory_in("while opening the model"):
        check()
    return import_module(f"{__name__}.{name}")
