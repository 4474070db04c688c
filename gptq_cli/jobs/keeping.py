"""Keeping what a run finishes, and having what an earlier one finished: the engine's `Keeper` on a disk.

After each block its tensors are flushed, then its file in the journal is written, then the manifest that
names it. Now and then a snapshot of the hidden states follows, from which the next run goes on without
running the samples through all finished blocks again. A snapshot is written when that is worth it and costs
little, see `snapshot_time.py`.

A disk without room for it is not an error: the next run then takes longer to get back to where this one was.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta

from gptq_cli.checkpoint.destination import Destination
from gptq_cli.checkpoint.fingerprint import Fingerprint
from gptq_cli.checkpoint.held_signals import held_signals
from gptq_cli.checkpoint.journal import FinishedBlock, Journal, JournalError, Manifest, Snapshot
from gptq_cli.checkpoint.kept_states import StatesOnDisk
from gptq_cli.checkpoint.snapshot import read_snapshot, write_snapshot
from gptq_cli.checkpoint.tuned_values import read_tuned, with_tuned
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.engine.capture import Captured, HiddenStates
from gptq_cli.engine.keep import by_sample
from gptq_cli.engine.together import Samples, Stored, collected, restore_together
from gptq_cli.engine.tuned import Tuned
from gptq_cli.events import Observer, Warned, phase
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.jobs.run_report import LIBRARIES, versions
from gptq_cli.jobs.snapshot_time import Clock
from gptq_cli.model.skeleton import LinearInfo, Skeleton
from gptq_cli.placement.device import format_size
from gptq_cli.ranks.team import Team
from gptq_cli.results.run import BlockReport, StartReport
from gptq_cli.wording import number_of


class Keeping:
    """The `Keeper` of a run: `journal` has what is finished, `writer` the tensors."""

    def __init__(
        self,
        *,
        journal: Journal,
        writer: CheckpointWriter,
        destination: Destination,
        skeleton: Skeleton,
        start: StartReport,
        clock: Clock,
        observer: Observer,
        warnings: Callable[[], tuple[str, ...]],
        team: Team,
    ) -> None:
        self._team = team
        self._journal, self._writer, self._destination = journal, writer, destination
        self._skeleton, self._start, self._clock = skeleton, start, clock
        self._observer, self._warnings = observer, warnings
        self._before = journal.manifest
        self._finished: list[BlockReport] = []
        self._room = True
        self._tuned: Tuned | None = None
        self.snapshot_bytes = 0
        """The largest snapshot."""

    @property
    def finished(self) -> tuple[BlockReport, ...]:
        """See `Keeper.finished`."""
        return tuple(self._finished)

    @property
    def starts(self) -> tuple[StartReport, ...]:
        """Every start, this one with its seconds so far."""
        own = replace(
            self._start,
            seconds=self._clock.seconds,
            blocks=len(self._finished) - self._start.first_block,
        )
        return (*self._before.starts, own)

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """Those of every start, each once."""
        return tuple(dict.fromkeys((*self._before.warnings, *self._warnings())))

    @property
    def phase_seconds(self) -> tuple[tuple[str, float], ...]:
        """What keeping took."""
        named = (("journal", self._clock.journal_seconds), ("snapshots", self._clock.snapshot_seconds))
        return tuple((name, seconds) for name, seconds in named if seconds)

    def adopt(self) -> None:
        """Take what the journal says is finished, block by block, up to the first that is not as it says."""
        named = len(self._journal.manifest.blocks)
        if untuned := self._read_tuned():
            self._observer(Warned(f"the tuned values cannot be used: {untuned}; they are worked out again"))
        blocks, problem = self._sound_blocks()
        if problem and self._tuned is not None:  # they count with all blocks: are the old ones there?
            self._tuned = None
            blocks, problem = self._sound_blocks()
        for block in blocks:
            self._writer.adopt(block.tensors)
            self._finished.append(block.report)
        count = len(self._finished)
        if problem:
            self._observer(
                Warned(
                    f"what is kept of {self._skeleton.blocks[count]} cannot be used: {problem}; "
                    f"the run goes on from there instead of from block {named}",
                    "if files change by themselves, check the disk",
                )
            )
            self._journal.manifest = self._journal.without(count)
        self._start = replace(self._start, first_block=count)
        if problem := self._gradients_problem(count):
            self._observer(
                Warned(
                    f"the dense model's gradients are not as they were kept; they are taken again: {problem}",
                    "if files change by themselves, check the disk",
                )
            )
            self._journal.manifest = replace(self._journal.manifest, gradients=False)
        self._destination.kept = self._worth_keeping
        if self._worth_keeping:
            self._warn_of_other_libraries()
            self._warn_of_rewritten_weights()
            self._commit(self._journal.manifest)
            self._journal.tidy()

    def _sound_blocks(self) -> tuple[list[FinishedBlock], str]:
        """The finished blocks up to the first that is not as the journal says, and what is wrong with that
        one; "" where they all are."""
        found: list[FinishedBlock] = []
        for number in range(len(self._journal.manifest.blocks)):
            try:
                block = self._journal.read_block(number)
            except JournalError as error:
                return found, str(error)
            if problem := self._misfit(number, block):
                return found, problem
            found.append(block)
        return found, ""

    def _gradients_problem(self, first: int) -> str:
        """Why the gradients of the blocks from `first` on are not those that the journal has; "" where they
        are, and where no block is left that needs them."""
        held = self._journal.manifest.gradients and first < len(self._skeleton.blocks)
        return StatesOnDisk(self._destination.gradients).problem(first) if held else ""

    def _warn_of_other_libraries(self) -> None:
        """They may round otherwise, so the result may differ from an uninterrupted run's."""
        now = dict(self._start.versions)
        for name, before in self._before.starts[-1].versions if self._before.starts else ():
            if name in LIBRARIES and before != now.get(name):
                self._observer(
                    Warned(
                        f"what is kept was made with {name} {before}, and this is {now.get(name)}: "
                        "codes may differ a little from those of a run in one piece",
                        f"install {name} {before} for the same bytes",
                    )
                )

    def _warn_of_rewritten_weights(self) -> None:
        """Files of weights are compared by header and samples, so another time of writing is worth a word."""
        before = dict(self._before.written)
        for name, time_ns in written_times(self._skeleton):
            if before.get(name, time_ns) != time_ns:
                self._observer(
                    Warned(
                        f"{name} has another modification time than when what is kept was made; its "
                        "size, header and samples of its weights are equal, so it is taken to be the same",
                        "if its weights were changed: --resume never",
                    )
                )

    def _misfit(self, number: int, block: FinishedBlock) -> str:
        """Why a finished block is not one of this model, or not in the files any more; else ""."""
        name = self._skeleton.blocks[number]
        expected = self._writer.packed_names(self._skeleton.linears_of(name))
        if block.report.name != name or set(block.tensors) != expected:
            return "its tensors are others than planned"
        damaged = self._writer.damaged(block.tensors, self._tuned.tensors if self._tuned is not None else ())
        return f"tensor {damaged} is not in the files as it was written" if damaged else ""

    def packed(self, linear: LinearInfo) -> PackedTensors:
        """See `Keeper.packed`."""
        return self._team.decided(lambda: self._writer.read_packed(linear))

    def restore(self, states: HiddenStates) -> int:
        """See `Keeper.restore`. A snapshot that cannot be used is named in a warning."""
        block, fitted = restore_together(self._team, states, self._stored)
        if not fitted:
            self._warn_of_snapshot("it holds other samples")
        return block

    def _stored(self) -> tuple[Stored, int] | None:
        """The samples of the snapshot, and the block that they enter; None where there is none to use."""
        snapshot = self._journal.manifest.snapshot
        if snapshot is None:
            return None
        try:
            return read_snapshot(self._journal.folder, snapshot.part), snapshot.block
        except JournalError as error:
            self._warn_of_snapshot(str(error))
            return None

    def _warn_of_snapshot(self, problem: str) -> None:
        self._observer(
            Warned(
                f"the snapshot cannot be used: {problem}; the samples run through the finished blocks again",
                "if files change by themselves, check the disk",
            )
        )

    def keep_gradients(self) -> None:
        """See `Keeper.keep_gradients`."""
        if self._journal.manifest.gradients:
            return
        with self._clock.added("journal_seconds"), held_signals(), self._writer.disk():
            self._commit(replace(self._journal.manifest, gradients=True))
            self._destination.kept = True

    def keep(self, report: BlockReport, states: HiddenStates) -> None:
        """See `Keeper.keep`."""
        with self._clock.added("journal_seconds"), held_signals(), self._writer.disk():
            tensors = self._writer.flush()
            number = len(self._finished)
            part = self._journal.write_block(number, FinishedBlock(report=report, tensors=tensors))
            manifest = self._journal.manifest
            self._finished.append(report)
            try:
                self._commit(replace(manifest, blocks=(*manifest.blocks, part)))
            except BaseException:
                self._finished.pop()
                raise
            self._destination.kept = True
        if self._team.decided(lambda: self._snapshot_due(states)):
            self._snapshot(collected(self._team, by_sample(states) or ()))

    def forget_unfinished(self) -> None:
        """See `Keeper.forget_unfinished`."""
        self._writer.take_back()

    def tuned(self) -> Tuned | None:
        """See `Keeper.tuned`."""
        return self._tuned

    def keep_tuned(self, tuned: Tuned) -> None:
        """See `Keeper.keep_tuned`. From here on the tensors in the files may be those before or after."""
        with self._clock.added("journal_seconds"), held_signals(), self._writer.disk():
            finished = with_tuned(self._journal, tuned.report, tuned.tensors)
            self._commit(replace(self._journal.manifest, tuning=finished))
        self._tuned = tuned

    def _read_tuned(self) -> str:
        """Take the tuning that the journal says is finished; why that cannot be used, else ""."""
        try:
            found = read_tuned(self._journal)
        except JournalError as error:
            return str(error)
        self._tuned = Tuned(*found) if found is not None else None
        return ""

    def close(self) -> None:
        """The run ends without a checkpoint: note its seconds. Never raises for what the disk refuses."""
        self._destination.kept &= self._worth_keeping
        if self._destination.kept:
            with contextlib.suppress(OSError):
                self._commit(replace(self._journal.manifest, gradients=self._has_gradients))
                self._journal.tidy()

    @property
    def _worth_keeping(self) -> bool:
        return bool(self._journal.manifest.blocks) or self._has_gradients

    @property
    def _has_gradients(self) -> bool:
        return self._journal.manifest.gradients and StatesOnDisk(self._destination.gradients).complete

    def _commit(self, manifest: Manifest) -> None:
        self._journal.commit(replace(manifest, starts=self.starts, warnings=self.all_warnings))

    def _snapshot_due(self, states: HiddenStates) -> bool:
        """Never where the samples live inside forwards that are kept open."""
        if len(self._finished) == len(self._skeleton.blocks) or not self._room or by_sample(states) is None:
            return False
        assert isinstance(states, Captured)
        own = sum(h.numel() * h.element_size() for h in (*states.hidden, *states.dense))
        earlier = sum(start.seconds for start in self._before.starts)
        return self._clock.snapshot_due(own * self._team.size, earlier)

    def _snapshot(self, samples: Samples) -> None:
        named = dict(samples)
        size = sum(value.nbytes for value in named.values())
        begun = time.perf_counter()
        before, block = self._journal.manifest.snapshot, len(self._finished)
        path = self._journal.folder / f"hidden-{block}.safetensors"
        with self._clock.added("snapshot_seconds"):
            try:
                part = write_snapshot(path, named.items())
                self._commit(replace(self._journal.manifest, snapshot=Snapshot(block, part)))
                if before is not None:
                    (self._journal.folder / before.part.file).unlink(missing_ok=True)
            except OSError as error:
                self._without_snapshots(error, size)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                return
        self.snapshot_bytes = max(self.snapshot_bytes, part.size_bytes)
        self._clock.last_snapshot = time.perf_counter()
        self._clock.bytes_per_second = size / max(1e-6, self._clock.last_snapshot - begun)

    def _without_snapshots(self, error: OSError, size: int) -> None:
        self._room = False
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"there is no room for {format_size(size)}" if full else str(error.strerror)
        self._observer(
            Warned(
                f"the hidden states are not kept: {reason}; a run that goes on after this one takes "
                "longer to get back to where it was",
                "make room beside --out" if full else "",
            )
        )


def written_times(skeleton: Skeleton) -> tuple[tuple[str, int], ...]:
    """Modification times of the files with weights, in nanoseconds."""
    stamps = (stamp for stamp in skeleton.files.stamps if not stamp.whole)
    return tuple((stamp.name, stamp.mtime_ns) for stamp in stamps)


@contextmanager
def keeping(
    found: Journal | None,
    fingerprint: Fingerprint,
    *,
    asked: Fingerprint,
    writer: CheckpointWriter,
    destination: Destination,
    skeleton: Skeleton,
    devices: tuple[str, ...],
    started: float,
    observer: Observer,
    warnings: Callable[[], tuple[str, ...]],
    team: Team,
) -> Iterator[Keeping]:
    """The keeper of a run that began at `started` (of `time.perf_counter`); `found`: the journal of the work
    that it goes on with; `asked`: what the job asks for about bits."""
    manifest = Manifest(
        fingerprint=fingerprint,
        asked=asked,
        total=len(skeleton.blocks),
        starts=(),
        written=written_times(skeleton),
    )
    began = datetime.now().astimezone() - timedelta(seconds=time.perf_counter() - started)
    start = StartReport(
        started=began.isoformat(timespec="seconds"),
        host=socket.gethostname(),
        seconds=0.0,
        first_block=0,
        blocks=0,
        devices=devices,
        versions=versions(),
    )
    keeper = Keeping(
        journal=found or Journal(destination.journal, manifest),
        writer=writer,
        destination=destination,
        skeleton=skeleton,
        start=start,
        clock=Clock(started),
        observer=observer,
        warnings=warnings,
        team=team,
    )
    if found is not None:
        with phase(observer, "verify") as words:
            keeper.adopt()
            words.append(f"{len(keeper.finished)} of {number_of(len(skeleton.blocks), 'block')} finished")
    try:
        yield keeper
    except BaseException:
        keeper.close()
        raise
