"""The steps of `gptq inspect-map`: read the headers of the files, place, report."""

from __future__ import annotations

from dataclasses import replace

from gptq_cli.config import InspectJob
from gptq_cli.events import Observer, ignore
from gptq_cli.jobs.choosing import BitSearch
from gptq_cli.jobs.fetching import opening
from gptq_cli.jobs.steps import announce, placed, rates_for, work_of
from gptq_cli.jobs.together import check_share
from gptq_cli.jobs.watching import watching
from gptq_cli.model.describe import model_facts
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.planning.time import estimate
from gptq_cli.preflight.report import map_report, time_shown
from gptq_cli.results.map import MapReport


def inspect_map(job: InspectJob, observer: Observer = ignore) -> MapReport:
    """Where everything of a model would go, and whether that is allowed; reads no weight.

    Raises `ConfigError` where there are too few samples for `job.processes`.
    """
    check_share(job, job.processes or 1)
    with watching("inspect-map", observer) as watcher:
        with opening(job.model, watcher, weights=False) as files:
            opened = open_skeleton(files, job.model)
            search = BitSearch.of(job, opened)
            if search is not None:
                job = replace(job, quantize=search.config_of(search.choose(None)))
            skeleton = select_linears(opened, job.quantize)
            facts = model_facts(skeleton)
        budgets, resolution, findings = placed(job, skeleton, facts, processes=job.processes)
        if search is not None:
            findings = search.findings + search.others(findings)
        announce(findings, watcher)
        speed, schedule = rates_for(job, skeleton, facts, resolution, thorough=False), resolution.schedule
        work = replace(work_of(job, facts, job.processes or 0), ranks=0)  # the time of one process
        took = estimate(facts, work, schedule, speed) if speed is not None and schedule is not None else None
        return map_report(
            facts,
            resolution,
            spec=job.device_map,
            budgets=budgets,
            max_memory=job.max_memory,
            report=findings,
            given=job.devices is not None,
            time=time_shown(took),
            warnings=watcher.warnings,
        )
