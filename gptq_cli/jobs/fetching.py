"""A model of the Hub is fetched before it is opened: a phase of its own, which counts bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from gptq_cli.config import ModelRef
from gptq_cli.events import Observer, PhaseAdvanced, phase
from gptq_cli.model.find import find_model, is_on_hub
from gptq_cli.model.source import ModelFiles
from gptq_cli.placement.device import format_size

EVERY_SECONDS = 0.25
"""Between two events of a download."""


@contextmanager
def opening(ref: ModelRef, observer: Observer, *, weights: bool = True) -> Iterator[ModelFiles]:
    """The phase `open`, with what `find_model` gives; a model of the Hub is downloaded before it.

    Raises `ModelError`.
    """
    came = fetched(ref, observer, weights=weights) if is_on_hub(ref) else None
    with phase(observer, "open"):
        yield came if came is not None else find_model(ref, weights=weights)


def fetched(ref: ModelRef, observer: Observer, *, weights: bool = True) -> ModelFiles:
    """What `find_model` gives; a download is announced, and what has come of it.

    Raises `ModelError`.
    """
    if not is_on_hub(ref):
        return find_model(ref, weights=weights)
    with phase(observer, "download") as words:
        coming = _Coming(observer)
        files = find_model(ref, weights=weights, progress=coming)
        if weights:
            words.append(format_size(coming.came_bytes) if coming.came_bytes else "from the cache")
    return files


class _Coming:
    """Announces bytes as they come. `find_model` calls it from several threads, one at a time."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._first: tuple[float, int] | None = None
        self._announced = -EVERY_SECONDS
        self.came_bytes = 0

    def __call__(self, done: int, total: int | None) -> None:
        now = time.perf_counter()
        if self._first is None or not self.came_bytes:
            self._first = now, done
        self.came_bytes = done
        if now - self._announced < EVERY_SECONDS and done != total:
            return
        self._announced = now
        since, before = self._first  # what an earlier download left came at once
        left = None
        if total is not None and before < done < total:
            left = (now - since) / (done - before) * (total - done)
        self._observer(PhaseAdvanced("download", done, total, left))
