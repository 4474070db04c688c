"""The package as a library: `quantize` and `load`, with the options and the errors of the command line.

Nothing is printed. Warnings go to the logger `gptq_cli`; everything else that happens is an event, which an
`observer` can follow. Torch is imported by the first call, not by `import gptq_cli`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

from gptq_cli.config import (
    CalibrationConfig,
    DType,
    ModelRef,
    QuantizeConfig,
    QuantizeJob,
    parse_shard_size,
)
from gptq_cli.errors import ConfigError, QualityGateFailed
from gptq_cli.events import Event, Observer, ignore, warning_text
from gptq_cli.fields import CardKind, Resume, check_choice, nearest
from gptq_cli.load_job import LoadJob, proof_job, task_config
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.readers import Target, parse_targets
from gptq_cli.recipes import Recipe
from gptq_cli.results.push import PushConfig

if TYPE_CHECKING:
    from gptq_cli.results.run import RunReport

AnyPath = str | os.PathLike[str]
_LOGGER = logging.getLogger("gptq_cli")


def quantize(
    model: AnyPath,
    out: AnyPath,
    *,
    recipe: Recipe = "balanced",
    device_map: object = "auto",
    max_memory: object = None,
    targets: Collection[Target] | Target = (),
    tp: int = 1,
    dtype: DType = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    resume: Resume = "auto",
    strict: bool = False,
    card: CardKind = "full",
    evaluate: AnyPath | None = None,
    against_source: bool = False,
    max_kl: float | None = None,
    max_perplexity: float | None = None,
    tasks: Collection[str] | str = (),
    task_dir: AnyPath | None = None,
    task_limit: int | None = None,
    shots: int | None = None,
    min_scores: Mapping[str, float] | None = None,
    bench: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    observer: Observer = ignore,
    **options: Any,
) -> RunReport:
    """Quantize `model` (a directory or a Hub model id) and write a GPTQ checkpoint to the directory `out`.

        report = gptq_cli.quantize("MODEL", out="DIR", bits=4, samples=256, device_map={"": "cpu"})

    `options`: the fields of `QuantizeConfig` (`bits`, `group_size`, `sym`, `desc_act`, …), which win over
    `recipe`, and of `CalibrationConfig` (`samples`, `seq_len`, `seed`, `batch_size`), with `calibration` for
    its sources: a text or a path, or several with weights, as in `["chat.jsonl:messages*0.5", "pydoc*0.5"]`;
    None means "not given". `device_map`: every form of `--device-map`, a mapping of names to
    devices, or one device, as text, number or `torch.device`. `max_memory`: text, or a mapping of devices to
    sizes. `targets`: readers that must take the result, on `tp` GPUs. `resume`: what to do about unfinished
    work of an interrupted run beside `out`: "auto" goes on with it, "never" removes it, "required" starts
    nothing without it. `card`: "none" leaves the model card out. `evaluate` (a text), `against_source`,
    `max_kl`, `max_perplexity` and `bench` measure the checkpoint once it is in place, and so do `tasks` of
    lm-evaluation-harness (`task_dir`: a folder of task files, `task_limit`: questions of each, `shots`:
    examples, `min_scores`: limits): the figures are the report's `proof`; where a limit is exceeded, the
    checkpoint stays and `QualityGateFailed` is raised. `push_to_hub`: the Hub id to upload the result to,
    `private` or not. `observer` gets every event of `gptq_cli.events`.

    Returns the report that is also in `out/report.json`. Raises what the command line exits with:
    `UsageError` (2, nothing was started), `PreflightRefused` (3, nothing was written; its text lists the
    findings; where something would lie on disk it is a `ValueError` as well), `OutOfDeviceMemory` (4),
    `QualityGateFailed` (5); and `TypeError` for an option that does not exist.
    """
    config, calibration = _sorted_options(options)
    job = QuantizeJob(
        model=ModelRef(
            model=os.fspath(model), revision=revision, trust_remote_code=trust_remote_code, dtype=dtype
        ),
        out=os.fspath(out),
        quantize=QuantizeConfig.of(recipe, **config),
        calibration=CalibrationConfig.of(**calibration),
        device_map=DeviceMap.parse(device_map),
        max_memory=None if max_memory is None else MaxMemory.parse(max_memory),
        max_shard_bytes=parse_shard_size(max_shard_size),
        overwrite=overwrite,
        resume=resume,
        strict=strict,
        targets=parse_targets((targets,) if isinstance(targets, str) else targets, tp),
        tp=tp,
    )
    check_choice("card", card, get_args(CardKind))
    push = None if push_to_hub is None else PushConfig(repo_id=push_to_hub, private=private)
    if private and push is None:
        raise ConfigError("private is True, but nothing is uploaded", hint="give push_to_hub, too")
    proof = proof_job(
        job.out,
        job.model.model,
        evaluate=None if evaluate is None else os.fspath(evaluate),
        against_source=against_source,
        max_kl=max_kl,
        max_perplexity=max_perplexity,
        tasks=task_config(
            ",".join((tasks,) if isinstance(tasks, str) else tasks) or None,
            directory=None if task_dir is None else os.fspath(task_dir),
            limit=task_limit,
            shots=shots,
            min_scores=[f"{name}={least}" for name, least in (min_scores or {}).items()],
        ),
        bench=bench,
        device_map=job.device_map,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    from gptq_cli import jobs
    from gptq_cli.report.card import card_files

    report = jobs.quantize(
        job, _logged(observer), card=card_files if card == "full" else None, proof=proof, push=push
    )
    if report.proof is not None and report.proof.failures:
        raise QualityGateFailed(
            "; ".join(report.proof.failures),
            hint="the checkpoint is complete and stays; the figures are in its report.json",
        )
    return report


def load(
    path: AnyPath, device_map: object = None, dtype: DType = "auto", *, trust_remote_code: bool = False
) -> Any:
    """Open the GPTQ checkpoint `path`: a Transformers model on packed weights, ready for `generate`.

    `device_map` takes every form that `quantize` takes; None: the current accelerator, or the CPU.
    `trust_remote_code`: run Python code that the checkpoint brings. The model's `save_pretrained` copies the
    checkpoint. What was read otherwise than the config says is logged as a warning of the logger `gptq_cli`.
    Raises `CheckpointError` naming the tensor that is wrong, `PreflightRefused` when the map is not legal.
    """
    job = LoadJob(
        path=os.fspath(path),
        device_map=None if device_map is None else DeviceMap.parse(device_map),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    from gptq_cli import jobs

    return jobs.open_model(job, _logged(ignore))


def _sorted_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `QuantizeConfig` and of `CalibrationConfig` in `options`. Raises `TypeError`."""
    codes = {item.name for item in fields(QuantizeConfig)}
    text = {item.metadata.get("name", item.name): item.name for item in fields(CalibrationConfig)}
    for name in options:
        if name not in codes and name not in text:
            near = nearest(name, [*codes, *text])
            hint = f"; did you mean {near}?" if near else ""
            raise TypeError(f"quantize() got an unexpected keyword argument {name!r}{hint}")
    given = {name: value for name, value in options.items() if value is not None}
    return (
        {name: value for name, value in given.items() if name in codes},
        {text[name]: value for name, value in given.items() if name in text},
    )


def _logged(observer: Observer) -> Observer:
    """`observer`, with every warning logged besides."""

    def log(event: Event) -> None:
        warning = warning_text(event)
        if warning is not None:
            _LOGGER.warning(warning)
        observer(event)

    return log
