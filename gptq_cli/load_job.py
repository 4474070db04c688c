"""What a person can ask of a finished checkpoint: `gptq load`, and how the next token is picked.

A wrong field raises `ConfigError`, as in `gptq_cli.config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from gptq_cli.config import DType, KernelChoice
from gptq_cli.errors import ConfigError
from gptq_cli.fields import INT64, check_choice, check_int, check_utf8
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.readers import Target, parse_targets
from gptq_cli.text_sources import OWN_TEXT, SOURCES


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is picked. Greedy when `temperature` is 0, which is the default."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int = 0
    """Of the draw; the global generators are left as they were."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(f"temperature is {self.temperature}; allowed: 0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}; allowed: above 0, at most 1")
        check_int("top_k", self.top_k, 0)
        check_int("seed", self.seed, 0, maximum=INT64)
        if self.temperature == 0 and (self.top_p < 1.0 or self.top_k):
            narrowed = f"top_k is {self.top_k}" if self.top_k else f"top_p is {self.top_p}"
            raise ConfigError(
                f"{narrowed}, but temperature is 0, which is greedy",
                hint="add --temperature 0.7, or leave it out",
            )


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """Which tasks of lm-evaluation-harness to measure, and what they must score."""

    names: tuple[str, ...]
    directory: str | None = None
    """A folder of task files, searched before the harness' own tasks."""
    limit: int | None = None
    """Questions of each task, at most; None: all."""
    shots: int | None = None
    """Examples in front of each question; None: as the task says."""
    min_scores: tuple[tuple[str, float], ...] = ()
    """(task, the least that its main metric may be)."""

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ConfigError(
                "tasks holds an empty name; allowed: names of tasks with commas between them",
                hint="--tasks arc_easy,hellaswag",
            )
        if self.limit is not None:
            check_int("task_limit", self.limit, 1)
        if self.shots is not None:
            check_int("shots", self.shots, 0)
        for name, least in self.min_scores:
            if name not in self.names:
                raise ConfigError(
                    f"min_score is about {name!r}, which is not measured; measured: {', '.join(self.names)}",
                    hint=f"add it: --tasks {','.join((*self.names, name))}",
                )
            if not math.isfinite(least):
                raise ConfigError(f"min_score of {name} is {least}; allowed: a number")


def task_config(
    names: str | None,
    *,
    directory: str | None,
    limit: int | None,
    shots: int | None,
    min_scores: Iterable[str],
) -> TaskConfig | None:
    """The tasks as a person writes them: names with commas between them, limits as `TASK=0.4`.

    None where none is named. Raises `ConfigError`.
    """
    limits = tuple(map(_min_score, min_scores))
    if names is None:
        given = {"task_dir": directory, "task_limit": limit, "shots": shots, "min_score": limits or None}
        for name in (name for name, value in given.items() if value is not None):
            raise ConfigError(f"{name} is given, but no task is measured", hint="add --tasks NAME")
        return None
    return TaskConfig(
        names=tuple(name.strip() for name in names.split(",")),
        directory=directory,
        limit=limit,
        shots=shots,
        min_scores=limits,
    )


def _min_score(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        return name.strip(), float(number)
    except ValueError as error:
        raise ConfigError(
            f"min_score is {text!r}; allowed: TASK=NUMBER", hint="--min-score arc_easy=0.4"
        ) from error


HELD_OUT = "pydoc-heldout"
"""The text to measure on where none is named: calibration leaves it out by default."""


def one_text(given: Sequence[str] | None) -> str | None:
    """The text to measure on, of all that --eval named. Raises `ConfigError` for more than one: figures are
    of one text."""
    if given is not None and len(given) > 1:
        raise ConfigError(
            f"--eval is given {len(given)} times: {', '.join(map(repr, given))}; allowed: one text",
            hint="measure each by itself: gptq load DIR --eval SOURCE, once for each",
        )
    return given[0] if given else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """Everything that `gptq load` needs to know."""

    path: str
    device_map: DeviceMap | None = None
    """None: the current accelerator, or the CPU where there is none."""
    dtype: DType = "auto"
    trust_remote_code: bool = False
    kernel: KernelChoice = "auto"
    compile: bool = False
    """Let torch.compile fuse what lies between the kernels."""
    prompt: str | None = None
    raw: bool = False
    """Give the prompt to the model as it stands, without the chat template."""
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    evaluate: str | None = None
    """Text to measure on: one source as for calibration. Of conversations, the answers alone count."""
    seq_len: int = 512
    windows: int = 64
    against: str | None = None
    """The dense model to compare with: a directory or a Hub model id."""
    max_kl: float | None = None
    """The job fails (exit 5) where KL(dense ‖ quantized) is above this."""
    max_perplexity: float | None = None
    tasks: TaskConfig | None = None
    """Tasks of lm-evaluation-harness."""
    bench: bool = False
    verify: bool = False
    targets: tuple[Target, ...] = ()
    """Readers that should take the checkpoint; exit 5 where one will not."""
    tp: int = 1
    """Ranks of tensor parallelism on which they should."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, get_args(DType))
        check_choice("kernel", self.kernel, get_args(KernelChoice))
        check_int("max_new_tokens", self.max_new_tokens, 1)
        check_int("seq_len", self.seq_len, 2)
        check_int("windows", self.windows, 1)
        parse_targets(self.targets, self.tp)
        if self.prompt is not None:
            check_utf8("prompt", self.prompt)
        if self.against == "":
            raise ConfigError("against is empty; allowed: a directory or a Hub model id")
        if self.evaluate == "":
            raise ConfigError(
                f"eval is empty; allowed: {HELD_OUT}, {SOURCES}", hint=f"--eval {HELD_OUT}, or leave it out"
            )
        if self.evaluate == OWN_TEXT and self.against is None:
            raise ConfigError(
                f"eval is {OWN_TEXT}, the text that the dense model writes, and no dense model is named",
                hint="add --against MODEL",
            )
        _gate("max_kl", self.max_kl, self.against, "--against DENSE")
        _gate("max_perplexity", self.max_perplexity, self.text, "--eval SOURCE")

    @property
    def text(self) -> str | None:
        """The text to measure on: `evaluate`, or where only `against` is given, `HELD_OUT`."""
        return self.evaluate or (HELD_OUT if self.against is not None else None)

    @property
    def opens(self) -> bool:
        """Whether the model itself is needed; --verify and --target alone read the files."""
        texts = (self.prompt, self.evaluate, self.against, self.tasks)
        uses = self.bench or any(one is not None for one in texts)
        return uses or not (self.verify or self.targets)


def proof_job(
    path: str,
    model: str,
    *,
    evaluate: str | None,
    against_source: bool,
    max_kl: float | None,
    max_perplexity: float | None,
    tasks: TaskConfig | None,
    bench: bool,
    device_map: DeviceMap | None,
    dtype: DType,
    trust_remote_code: bool,
) -> LoadJob | None:
    """What to measure of the checkpoint at `path` that is made of `model`; None where nothing is asked for.

    Raises `ConfigError`.
    """
    if evaluate == "-":
        raise ConfigError(
            "eval is '-', and standard input is not read here", hint="give --eval a file, or pydoc-heldout"
        )
    if evaluate == OWN_TEXT and not against_source:
        raise ConfigError(
            f"eval is {OWN_TEXT}, which the dense model writes, but nothing is compared with that model",
            hint="add --against-source",
        )
    if max_kl is not None and not against_source:
        raise ConfigError(f"max_kl is {max_kl}, but nothing is measured for it", hint="add --against-source")
    if not (evaluate is not None or against_source or bench or tasks or max_perplexity is not None):
        return None
    return LoadJob(
        path=path,
        device_map=device_map,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        evaluate=evaluate,
        against=model if against_source else None,
        max_kl=max_kl,
        max_perplexity=max_perplexity,
        tasks=tasks,
        bench=bench,
    )


def _gate(name: str, limit: float | None, measurement: str | None, needed: str) -> None:
    if limit is None:
        return
    if not (math.isfinite(limit) and limit >= 0):
        raise ConfigError(f"{name} is {limit}; allowed: a number of at least 0")
    if measurement is None:
        raise ConfigError(f"{name} is {limit}, but nothing is measured for it", hint=f"add {needed}")
