"""Heartbeats: a rank that is gone, or stuck, ends all of them, and is named.

Every rank has a thread that says once a second, in the store in which the ranks met, that it lives, where its
work is, and how often it has waited for the others. Rank 0 reads what all say, the others what rank 0 says.

    ended         its process is not there any more, or says that it failed: at once
    silent        nothing heard for `Limits.silent_seconds`: its machine or the network is gone, or it is
                  stopped
    stuck         it lives, but others have waited for it for `Limits.stuck_seconds`

Whoever notices keeps the error; the main thread raises it the next time that it waits for others
(`Watch.check`). So every rank ends by itself, in order, with what is finished on the disk.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import psutil

from gptq_cli.errors import (
    CalibrationError,
    ConfigError,
    GptqError,
    LinearLost,
    ModelError,
    NonFinite,
    NotPositiveDefinite,
    OutOfDeviceMemory,
    RankLost,
    SourceChanged,
    WeightTooLarge,
)
from gptq_cli.wording import duration_words, first_line

_ERRORS: dict[str, Callable[..., GptqError]] = {
    kind.__name__: kind
    for kind in (
        CalibrationError,
        ConfigError,
        ModelError,
        NonFinite,
        LinearLost,
        NotPositiveDefinite,
        OutOfDeviceMemory,
        SourceChanged,
        WeightTooLarge,
    )
}
"""Errors that mean the same on whatever rank they are raised."""
State = Literal["works", "left", "interrupted", "failed"]


class Store(Protocol):
    """Where the ranks leave word for each other: a part of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None:
        """Leave word."""
        ...

    def get(self, key: str) -> bytes:
        """The word that is there; waits for it."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether there is word under all keys."""
        ...


START = "the start"
"""Before the first block rank 0 works alone, for as long as that takes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long what may take."""

    beat_seconds: float = 1.0
    silent_seconds: float = 60.0
    stuck_seconds: float = 1800.0
    settle_seconds: float = 5.0
    """To find out who it was, once something has broken."""
    join_seconds: float = 300.0
    """Until all ranks are there."""


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Word:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    beat: int = 0
    where: str = START
    waits: int = 0
    """So many times it has begun to wait for the others."""
    state: State = "works"
    error: tuple[str, str, str] | None = None
    """Of a rank that failed: the name of the error's class, its message and its hint."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass(slots=True)
class _Heard:
    word: Word
    since: float
    """When its beat changed last."""
    moved: float
    """When `waits` changed last."""


class Watch:
    """The heartbeat of this rank, and its eye on the others. A context manager."""

    def __init__(self, store: Store, own: Word, size: int, limits: Limits = LIMITS) -> None:
        self._store, self._own, self._size, self.limits = store, own, size, limits
        self._others = range(1, size) if own.rank == 0 else range(1)
        self._heard: dict[int, _Heard] = {}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._waiting_since: float | None = None
        self._lost: GptqError | None = None
        self._thread = threading.Thread(target=self._run, name="gptq-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._say()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=2 * self.limits.beat_seconds)

    def at(self, where: str) -> None:
        """The work of this rank goes on at `where`."""
        self._change(where=where)

    @property
    def lost(self) -> bool:
        """Whether another rank is known to be gone."""
        return self._lost is not None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """This rank waits for the others."""
        self._change(waits=self._own.waits + 1)
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    @property
    def late(self) -> tuple[str, ...]:
        """Ranks that have waited less often than this one, which waits for them: as far as it is known, which
        takes a second or two."""
        words = [heard.word for heard in list(self._heard.values())]
        return tuple(
            f"rank {word.rank} on {word.host}"
            for word in words
            if word.state == "works" and word.waits < self._own.waits
        )

    def check(self) -> None:
        """Raise the error of a rank that is gone, as `blamed` tells it."""
        if self._lost is not None:
            raise self._lost

    def leave(self, state: State, error: BaseException | None = None) -> None:
        """Say how this rank ended: its last word."""
        told = None
        if error is not None:
            message = error.message if isinstance(error, GptqError) else f"{type(error).__name__}: {error}"
            told = (type(error).__name__, message, getattr(error, "hint", None) or "")
        self._change(state=state, error=told)
        with contextlib.suppress(RuntimeError):
            self._say()

    def outlive(self) -> None:
        """Stay until all others have said how they ended: this process may hold the store in which they do.
        Takes up to `Limits.settle_seconds`."""
        deadline = time.monotonic() + self.limits.settle_seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):
                words = [self._word_of(rank) for rank in range(self._size) if rank != self._own.rank]
                if all(word is None or word.state != "works" for word in words):
                    time.sleep(self.limits.beat_seconds / 2)  # in which they hear this rank's last word
                    return
            time.sleep(self.limits.beat_seconds / 10)

    def blamed(self) -> GptqError | None:
        """Something has broken: the error that names the rank whose fault it is; None where all others live,
        or ended on purpose. Takes up to `Limits.settle_seconds`."""
        deadline = time.monotonic() + self.limits.settle_seconds
        before = {rank: heard.word.beat for rank, heard in self._heard.items()}
        while self._lost is None and time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):
                self._look()
            unsure = [
                heard
                for rank, heard in self._heard.items()
                if heard.word.state == "works" and heard.word.beat == before.get(rank, -1)
            ]
            if self._lost is not None or not unsure:
                break
            time.sleep(self.limits.beat_seconds / 10)
        else:
            silent = [h.word for h in self._heard.values() if h.word.beat == before.get(h.word.rank)]
            if self._lost is None and silent:
                self._lose(RankLost(f"{silent[0]} ended {self._at()}", rank=silent[0].rank))
        return self._lost

    def _change(self, **changes: Any) -> None:
        with self._lock:
            self._own = replace(self._own, **changes)

    def _run(self) -> None:
        while not self._over.wait(self.limits.beat_seconds):
            try:
                self._say()
                self._look()
            except RuntimeError as error:  # the store's connection is gone, and with it whoever had it
                if not self._over.is_set() and self._own.state == "works":  # else rank 0 may have gone first
                    self._lost = self._lost or RankLost(
                        f"the store in which the ranks meet cannot be reached any more: {first_line(error)}",
                        rank=0,
                    )
                return

    def _say(self) -> None:
        self._change(beat=self._own.beat + 1)
        own = self._own
        self._store.set(
            f"rank/{own.rank}", json.dumps({n: getattr(own, n) for n in Word.__dataclass_fields__})
        )

    def _look(self) -> None:
        if self._lost is not None:
            return
        if self._store.check(["over"]):
            self._lost = _as_error(*json.loads(self._store.get("over")))
            return
        for rank in self._others:
            word = self._word_of(rank) if rank != self._own.rank else None
            error = self._judged(word) if word is not None else None
            if error is not None:
                self._lose(error)
                return

    def _word_of(self, rank: int) -> Word | None:
        """What a rank said last; None before its first word."""
        key = f"rank/{rank}"
        return Word(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _judged(self, word: Word) -> GptqError | None:
        """The error of a rank that is gone; None where it is well."""
        now, limits = time.monotonic(), self.limits
        heard = self._heard.get(word.rank)
        if heard is None:
            heard = self._heard[word.rank] = _Heard(word, now, now)
        if word.beat != heard.word.beat:
            heard.since = now
        if word.waits != heard.word.waits:
            heard.moved = now
        heard.word = word
        if word.state == "failed" and word.error is not None:
            name, message, hint = word.error
            return _as_error(name, f"{word}: {message}", hint, None)
        if word.state == "interrupted" and now - heard.since > limits.settle_seconds:
            return RankLost(  # and this one was not: it would be by now
                f"{word} was interrupted {self._at()}", rank=word.rank
            )
        if word.state != "works":
            return None
        if word.host == self._own.host and not _alive(word.pid):
            return RankLost(f"{word} ended {self._at()}", rank=word.rank)
        if now - heard.since > limits.silent_seconds:
            return RankLost(
                f"nothing was heard of {word} for {duration_words(limits.silent_seconds)}, {self._at()}",
                hint="its machine or the network is gone, or the process is stopped",
                rank=word.rank,
            )
        waiting = self._waiting_since
        stuck = waiting is not None and now - max(waiting, heard.moved) > limits.stuck_seconds
        if stuck and word.waits < self._own.waits and word.where != START:
            return RankLost(
                f"{word} is stuck {self._at()}: the others have waited for it for "
                f"{duration_words(limits.stuck_seconds)}",
                hint="a file system that does not answer may be why",
                rank=word.rank,
            )
        return None

    def _at(self) -> str:
        """Where the ranks are: they are never more than a step apart, and word of it takes a second."""
        return f"at {self._own.where}"

    def _lose(self, error: GptqError) -> None:
        self._lost = error
        with contextlib.suppress(RuntimeError):
            told = (type(error).__name__, error.message, error.hint or "", getattr(error, "rank", None))
            self._store.set("over", json.dumps(told))


def _as_error(name: str, message: str, hint: str, rank: int | None) -> GptqError:
    """The error that another rank told of, as one of this process."""
    kind = _ERRORS.get(name)
    if kind is None:
        return RankLost(message, hint=hint or None, rank=rank)
    return kind(message, hint=hint or None)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
