"""What is checked before torch is imported, which takes seconds: is there a model, may the output be written?

Each function raises what the job would raise, in the same words; all else is left to the job.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gptq_cli.checkpoint.configs import checkpoint_directory, read_formats
from gptq_cli.config import InspectJob, ModelRef, QuantizeJob
from gptq_cli.errors import ConfigError
from gptq_cli.events import FindingRaised, Observer
from gptq_cli.findings import PreflightReport
from gptq_cli.load_job import LoadJob, TaskConfig
from gptq_cli.model.find import glance_at_model
from gptq_cli.results.push import PushConfig


def before_quantize(job: QuantizeJob, observer: Observer, push: PushConfig | None = None) -> None:
    """Raise `ModelError` where there is no model, and `PreflightRefused` with every error that is certain.

    Where an ended run left something to put in order, the output is left to the job, which does so.
    """
    files = glance_at_model(job.model)
    from gptq_cli.checkpoint.place import Place  # not at the top: `gptq load` answers without them
    from gptq_cli.preflight.early import early_findings
    from gptq_cli.preflight.facts import output_facts

    unsettled = Place.of(job.out.replace("\0", "?")).is_begun
    place = None if unsettled else output_facts(job.out, files.directory, resume=job.resume)
    report = check_push(push) + early_findings(job, files, place)
    _refuse(report, observer)


def _refuse(report: PreflightReport, observer: Observer) -> None:
    """Raise `PreflightRefused` where it has an error, all findings announced."""
    if report.ok:
        return
    from gptq_cli.preflight.resolve import refusal

    for finding in report.ordered():
        observer(FindingRaised(finding))
    raise refusal(report)


def before_plan(job: InspectJob | QuantizeJob) -> None:
    """Raise `ModelError` where there is no model; the result lists everything else."""
    glance_at_model(job.model)


def before_push(path: str, push: PushConfig, observer: Observer) -> None:
    """Raise `CheckpointError` where there is no checkpoint, `PreflightRefused` where it may not be sent."""
    read_formats(checkpoint_directory(path))
    _refuse(check_push(push), observer)


def before_load(job: LoadJob) -> None:
    """Raise `CheckpointError` where there is no checkpoint, `ModelError` where there is no dense model.

    What is wrong inside a checkpoint is the answer of --verify, and no error there.
    """
    check_harness(job.tasks)
    directory = checkpoint_directory(job.path)
    if job.verify or job.targets:
        return
    read_formats(directory)
    if job.against is not None:
        glance_at_model(ModelRef(model=job.against, trust_remote_code=job.trust_remote_code))


def check_push(push: PushConfig | None) -> PreflightReport:
    """What stands against an upload; nothing where none is asked for."""
    if push is None:
        return PreflightReport()
    from gptq_cli.checkpoint.upload import look  # not at the top: it imports the client of the Hub
    from gptq_cli.preflight.rules import push as rules_push
    from gptq_cli.rules import rules_in

    state = look(push)
    return PreflightReport(tuple(finding for one in rules_in(rules_push) for finding in one(state)))


def check_harness(config: TaskConfig | None) -> None:
    """Raise `ConfigError` where the harness is not installed, or `config.directory` is none."""
    if config is None:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"tasks is {','.join(config.names)!r}, but lm-evaluation-harness is not installed",
            hint="pip install 'gptq-cli[eval]'",
        )
    if config.directory is not None and not Path(config.directory).is_dir():
        raise ConfigError(
            f"task_dir is {config.directory!r}, which is not a directory",
            hint="give --task-dir the folder that holds the YAML files of the tasks",
        )
