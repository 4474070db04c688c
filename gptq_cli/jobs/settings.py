"""`settings` of report.json: every option that a run needs to be run again, by its name in a preset.

`gptq quantize --config report.json` reads them. Not among them is what only says how to go about it: what to
do with an output that exists, what is shown and where, and whether the result is uploaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from gptq_cli.config import QuantizeJob
from gptq_cli.load_job import LoadJob, TaskConfig
from gptq_cli.results.run import Setting


def settings_of(
    job: QuantizeJob, *, revision: str | None, card: bool, proof: LoadJob | None
) -> tuple[tuple[str, Setting], ...]:
    """Names and values, everything that depends on the model resolved: `job.quantize` has a number of
    columns a group, `revision` is the commit that was read. Its settings by module are those that were given
    or chosen, without the bits that the head has by itself."""
    return (
        ("model", job.model.model),
        ("revision", revision),
        ("dtype", job.model.dtype),
        ("trust_remote_code", job.model.trust_remote_code),
        ("out", job.out),
        ("max_shard_size", f"{job.max_shard_bytes}B"),
        ("card", "full" if card else "none"),
        ("target", job.targets),
        ("tp", job.tp),
        ("strict", job.strict),
        ("device_map", str(job.device_map)),
        ("max_memory", None if job.max_memory is None else str(job.max_memory)),
        *_fields(job.quantize),
        *_fields(job.calibration),
        *_measured(proof),
    )


def _measured(proof: LoadJob | None) -> Iterator[tuple[str, Setting]]:
    """What was to be measured of the result."""
    if proof is not None:
        yield "eval", proof.evaluate
        yield "against_source", proof.against is not None
        yield "max_kl", proof.max_kl
        yield "max_perplexity", proof.max_perplexity
        yield "bench", proof.bench
        yield from _tasks(proof.tasks)


def _tasks(tasks: TaskConfig | None) -> Iterator[tuple[str, Setting]]:
    if tasks is not None:
        yield "tasks", ",".join(tasks.names)
        yield "task_dir", tasks.directory
        yield "task_limit", tasks.limit
        yield "shots", tasks.shots
        yield "min_score", tuple(f"{name}={least:g}" for name, least in tasks.min_scores)


def _fields(config: object) -> Iterator[tuple[str, Setting]]:
    """Every field of a configuration by the name of its option; what it has several of as texts."""
    for item in fields(config):  # type: ignore[arg-type]  # a configuration
        value = getattr(config, item.name)
        held = tuple(map(str, value)) if isinstance(value, tuple) else value
        yield item.metadata.get("name", item.name), held
