"""Moving a finished checkpoint to its destination, without endangering anything that is there.

Only a checkpoint that was there, unchanged, since the run began is ever removed. If the destination is taken
when the run ends, the result is kept beside it. Two runs with the same destination find each other through
the working folder beside it (`working_folder.py`). A destination that cannot be renamed, such as a
container's volume, is filled file by file, config.json last, so that it looks like a checkpoint only once it
is complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from gptq_cli.checkpoint.place import NOT_CONTENT, Place, State, placed_files, state_of
from gptq_cli.checkpoint.renames import exchange, fsync, rename_to_free
from gptq_cli.checkpoint.working_folder import Owner, WorkingFolder, marker_problem, remove, stem
from gptq_cli.errors import GptqError
from gptq_cli.model.source import INDEX
from gptq_cli.wording import names_text, number_of

_LAST = ("quantize_config.json", INDEX, "config.json")
_NAMED = 3


class Destination:
    """A context manager that reserves the destination during a run, and removes the working files at its end,
    unless they are to be `kept`.

    `overwrite`: a checkpoint that is there when the run begins is replaced, unless it changes meanwhile.
    `warn` is called with problems that do not stop the run. Entering raises `DestinationBusy`, `ConfigError`
    where something that is not ours has the working folder's name, and `OSError`.
    """

    def __init__(
        self, out: Path, *, overwrite: bool = False, warn: Callable[[str, str], None] = lambda _m, _h: None
    ) -> None:
        self.place = Place.of(out)
        self.out, self.overwrite = self.place.out, overwrite
        self.cleared: tuple[str, ...] = ()
        """What was done about the leftovers of an earlier run."""
        self.warn = warn
        self._folder = WorkingFolder(self.place.folder, self.out)
        self._made_parents: list[Path] = []
        self._begun = State("absent")
        self._held = self._given = False
        self.kept = False
        """The working files outlast the run, so that another one can go on. False again once the checkpoint
        is in place."""
        self._saved = self.result
        """Where a result is that could not be put in place."""

    @property
    def folder(self) -> Path:
        """The working folder."""
        return self._folder.path

    @property
    def result(self) -> Path:
        """The directory in which the checkpoint is written."""
        return self._folder.result

    @property
    def journal(self) -> Path:
        """Where the journal is."""
        return self._folder.journal

    @property
    def gradients(self) -> Path:
        """Where those of the dense model are kept."""
        return self._folder.gradients

    @property
    def unlocked(self) -> str:
        """Why the working folder has no kernel lock, where it has none."""
        return self._folder.unlocked

    def __enter__(self) -> Self:
        self.place.check_free()
        try:
            for parent in reversed(self.out.parents):
                if not parent.exists():
                    with contextlib.suppress(FileExistsError):  # made by a run that began at the same time
                        parent.mkdir()
                        self._made_parents.append(parent)
            before = self._folder.claim()
        except BaseException:
            self._remove_parents()
            raise
        self._held = True
        try:
            self._recover(before)
            self._begun = self._look()
            if not self.kept:
                self.result.mkdir()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def start_over(self) -> None:
        """Remove the unfinished work of an earlier run. Raises `OSError`."""
        self.kept = False
        self._folder.clear()
        self.result.mkdir()

    def put_in_place(self) -> None:
        """Move the finished result to the destination, as the last step, and remove the working folder.

        Where the destination has changed, or the system refuses, raises a `GptqError` that says where the
        result is kept.
        """
        try:
            now = self._look()
            if self.place.inside:
                self._check(now.kind == "empty" and now.identity == self._begun.identity, now)
                self._fill()
            elif now.kind in ("absent", "empty"):
                self._mark_moving()
                os.rename(self.result, self.out)  # which never replaces a directory that holds something
            else:
                self._check(self.overwrite and now.kind == "checkpoint" and now == self._begun, now)
                self._mark_moving()
                self._replace()
        except OSError as error:
            raise self._kept(f"{self.out} cannot be put in place: {error.strerror}") from error
        try:
            self.kept = False
            for path in (self.out, self.out.parent, self.folder):
                fsync(path)
        except OSError as error:
            raise GptqError(
                f"{self.out} is in place, but may not be on the disk: {error.strerror}"
            ) from error
        self._leave()

    def _mark_moving(self) -> None:
        """Record which directory will be the destination, where another run would have work to go on with."""
        if self._folder.journal.is_dir():
            self._folder.mark(moving=os.lstat(self.result).st_ino)

    def _look(self) -> State:
        return state_of(self.out, NOT_CONTENT if self.place.inside else ())

    def _check(self, same: bool, now: State) -> None:
        """Unless the place is the `same` as when the run began, keep the result and raise."""
        if same:
            return
        begun = {"absent": "it did not exist, and now", "empty": "it was empty, and now"}
        was = begun.get(self._begun.kind, "it")
        names = self._begun.differences(now)
        listed = names_text(names, _NAMED)
        if now.kind == "other" and not now.entries:
            what = f"{was} is not a directory"
        elif self._begun.kind != "checkpoint":
            what = f"{was} holds {listed}" if names else f"{was} is another directory"
        elif now.identity != self._begun.identity:
            what = f"another {'checkpoint' if now.kind == 'checkpoint' else 'directory'} is there"
        else:
            what = f"new, gone or changed in it: {listed}"
        raise self._kept(f"{self.out} changed during the run, and was not touched: {what}")

    def _replace(self) -> None:
        """Exchange the result and the old checkpoint; whatever else is found there is put back."""
        if exchange(self.result, self.out):
            now = state_of(self.result)
            if now != self._begun:
                self._exchange_back()
                self._check(False, now)
            return
        old = self._folder.old
        os.rename(self.out, old)
        try:
            now = state_of(old)
            self._check(now == self._begun, now)
            os.rename(self.result, self.out)
        except BaseException as error:
            try:
                rename_to_free(old, self.out)
            except OSError as failed:
                kept = self._keep(old, "old")
                raise self._kept(
                    f"{self.out} could not be replaced ({error}), and the old checkpoint could not be put "
                    f"back ({failed.strerror}): it is {kept}"
                ) from error
            raise

    def _exchange_back(self) -> None:
        """Undo an exchange; where that fails, too, what was found there is kept."""
        try:
            exchange(self.result, self.out)
        except OSError as error:
            kept = self._keep(self.result, "found")
            raise GptqError(
                f"the checkpoint is at {self.out}; what was there at the last moment could not be put back "
                f"({error.strerror}): it is {kept}"
            ) from error

    def _fill(self) -> None:
        """Move the files one by one into the directory; those that make it a checkpoint come last."""
        names = sorted(set(os.listdir(self.result)) - set(_LAST))
        names += [name for name in _LAST if os.path.lexists(self.result / name)]
        entries = {name: os.lstat(self.result / name) for name in names}
        self._folder.mark({name: (entry.st_ino, entry.st_size) for name, entry in entries.items()})
        moved: list[str] = []
        try:
            for name in names:
                if name == names[-1]:
                    fsync(self.out)
                rename_to_free(self.result / name, self.out / name)
                moved.append(name)
        except OSError:
            for name in reversed(moved):
                rename_to_free(self.out / name, self.result / name)
            raise

    def _kept(self, message: str) -> GptqError:
        """Keep a result that could not be put in place, and return the error that says where it is."""
        self.kept = False
        if self.result.is_dir():
            self._saved = self._keep(self.result, "finished")
        return GptqError(
            message,
            hint=f"the finished checkpoint is {self._saved}; once the place is free: "
            f"mv {shlex.quote(str(self._saved))} {shlex.quote(str(self.out))}",
        )

    def _keep(self, path: Path, word: str) -> Path:
        """Move a directory out of the working folder, to a name that no later run will clean up."""
        for number in range(1, 1000):
            name = f"{stem(self.out.name) or 'gptq'}.{word}{f'-{number}' if number > 1 else ''}"
            kept = self.folder.parent / name
            try:
                rename_to_free(path, kept)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    continue
                break
            with contextlib.suppress(OSError):  # it was moved, though perhaps not yet on the disk
                fsync(kept.parent)
            return kept
        self._folder.unmark()
        self._given = True
        return path

    def _recover(self, before: Owner | None) -> None:
        """Clean up after an earlier run, then claim the folder. What it had finished is kept."""
        self.kept = self.place.has_work()
        words, _ = self.place.left_over(done=True)
        old = self._folder.old
        said = [text for text in (marker_problem(self.folder), words) if text]
        if os.path.isdir(old):
            if not os.path.lexists(self.out):
                os.rename(old, self.out)
                fsync(self.out.parent)
            elif os.path.lexists(self.result):  # it was moved aside, and something else took its place
                said.append(f"the old checkpoint that it had moved aside is {self._keep(old, 'old')}")
        placed = placed_files(self.out, before)
        for name, path in reversed(placed):
            if self.kept:
                rename_to_free(path, self.result / name)
            else:
                remove(path)
        if placed and not self.kept:
            said.append(f"removed {number_of(len(placed), 'file')} that it had moved to {self.out}")
        self._folder.mark()
        if self.kept:
            remove(old)
        else:
            self._folder.clear()
        self.cleared = tuple(said)

    def _leave(self) -> None:
        """Remove the working files; the next run removes what cannot be removed now."""
        if not self._held:
            return
        self._held = False
        try:
            if not self._given and not self.kept:
                self._folder.clear()
                self._folder.release()
        except OSError as error:
            self.warn(f"{error.filename} could not be removed: {error.strerror}", f"remove {self.folder}")
        finally:
            self._folder.let_go()
        if not self.kept:
            self._remove_parents()

    def _remove_parents(self) -> None:
        for parent in reversed(self._made_parents):
            with contextlib.suppress(OSError):  # something else uses it by now
                parent.rmdir()
