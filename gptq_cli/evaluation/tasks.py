"""Scores on the tasks of lm-evaluation-harness (`lm_eval`), where that is installed.

The tasks are found and their texts read before a weight is (`open_tasks`), so that a wrong name or a text
that cannot be had costs nothing. The harness then gets the loaded model itself: prompts, metrics and standard
errors are its own, so the figures are those that others publish.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gptq_cli.errors import ConfigError, NonFinite
from gptq_cli.fields import nearest
from gptq_cli.load_job import TaskConfig
from gptq_cli.model.running import matmul_scope_of
from gptq_cli.results.load import TaskScore
from gptq_cli.wording import first_line, names_text

MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity")
"""Of the metrics of a task, the first of these is the one that is shown first and that a limit is about."""
FEWSHOT_SEED = 1234
"""The harness' own."""
_LOGIT_ELEMENTS = 1 << 27
"""float32 logits of one batch: half a GiB, at 512 tokens a row."""
_STEPS = 200
"""How often progress is reported."""
OnAnswer = Callable[[int, int], None]
"""Called with (requests answered, requests known so far)."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """Opened tasks, as the harness holds them."""

    loaded: Mapping[str, Any]
    limit: int | None
    names: tuple[str, ...]
    """Those that were asked for."""


def open_tasks(config: TaskConfig) -> Tasks:
    """Find the tasks and read their texts. Raises `ConfigError` with what cannot be opened."""
    with _quiet():
        manager = _manager(config)
        known = set(manager.all_tasks)
        for name in config.names:
            if name not in known:
                near = nearest(name, sorted(known))
                hint = f"did you mean {near}?" if near else "`lm_eval ls tasks` lists those of the harness"
                raise ConfigError(f"tasks has {name!r}, which is not the name of a task", hint=hint)
        try:
            loaded = manager.load(list(config.names))
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever a task file or a loader of texts raises
            raise ConfigError(
                f"{names_text(config.names)} cannot be opened: {first_line(error)}",
                hint="offline, texts must be in the cache of the Hub, or local files named in --task-dir",
            ) from error
    for task in loaded["tasks"].values():
        _set_shots(task, config.shots)
    return Tasks(loaded, config.limit, config.names)


def _manager(config: TaskConfig) -> Any:
    """The index of tasks: of the folder alone where that has all of them, since the harness takes half a
    minute to read its own."""
    from lm_eval.tasks import TaskManager

    if config.directory is not None:
        local = TaskManager(include_path=config.directory, include_defaults=False)
        if set(config.names) <= set(local.all_tasks):
            return local
    return TaskManager(include_path=config.directory)


def _set_shots(task: Any, shots: int | None) -> None:
    """As the harness does: a task that says 0 itself keeps it."""
    own = task.get_config("num_fewshot")
    if own != 0 and (shots is not None or own is None):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def score(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    max_length: int | None = None,
    on_answer: OnAnswer = lambda done, total: None,
) -> tuple[TaskScore, ...]:
    """The scores of `model` on `tasks`; of a group also the mean that the harness makes.

    `max_length`: tokens that the model can process at once. Raises `NonFinite` for a score that is no number.
    """
    from lm_eval import evaluate

    with _quiet(), matmul_scope_of(model):
        harness = _harness_model(model, tokenizer, max_length, on_answer)
        found = evaluate(lm=harness, task_dict=tasks.loaded, limit=tasks.limit, log_samples=False)
    assert found is not None  # of one process
    results = {**found["results"], **found.get("groups", {})}
    return tuple(one for name, held in results.items() for one in _scores(name, held, found))


def _harness_model(model: Any, tokenizer: Any, max_length: int | None, on_answer: OnAnswer) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Loaded(HFLM):  # type: ignore[misc]  # the harness has no types
        """Our model, counting its requests."""

        asked, answered = 0, 0

        def add_partial(self, kind: str, request: object, answer: object) -> None:
            """As a cache of the harness: it is told every answer."""
            self.answered += 1
            if self.answered % max(1, self.asked // _STEPS) == 0 or self.answered == self.asked:
                on_answer(self.answered, self.asked)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self.asked += len(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self.asked += len(requests)
            return super().generate_until(requests, disable_tqdm=True)

    vocabulary = model.get_input_embeddings().num_embeddings
    rows = max(1, min(8, _LOGIT_ELEMENTS // (512 * vocabulary)))
    made = Loaded(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=rows, max_length=max_length
    )
    made.set_cache_hook(made)
    return made


def _scores(name: str, held: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Each metric of a task, the main one first."""
    metrics = [key for key in held if "," in key and "_stderr," not in key]
    rank = {metric: place for place, metric in enumerate(MAIN_METRICS)}
    metrics.sort(key=lambda key: rank.get(key.partition(",")[0], len(rank)))
    higher = found.get("higher_is_better", {}).get(name, {})
    for key in metrics:
        metric, _, filtered = key.partition(",")
        value = held[key]
        if not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise NonFinite(f"{metric} of task {name} is {value}", hint="the model's output is not finite")
        stderr = held.get(f"{metric}_stderr,{filtered}")
        yield TaskScore(
            task=name,
            metric=metric if filtered == "none" else f"{metric} ({filtered})",
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
            higher_is_better=bool(higher.get(metric, True)),
            samples=int(found.get("n-samples", {}).get(name, {}).get("effective", 0)) or None,
            shots=found.get("n-shot", {}).get(name),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness logs about itself; its errors are raised."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
