"""Where a checkpoint will be written, and what is there now.

A `Place` has one name, through whatever links and relative parts it was given. What is there is recorded as a
`State`: enough to decide later whether it is still the same, unchanged.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from gptq_cli.checkpoint.renames import is_mount
from gptq_cli.checkpoint.working_folder import (
    GRADIENTS,
    INSIDE,
    JOURNAL,
    OLD,
    RESULT,
    Owner,
    busy,
    is_held,
    is_ours,
    read_owner,
    stem,
    tree_bytes,
)
from gptq_cli.errors import ConfigError
from gptq_cli.placement.device import format_size

NOT_CONTENT = frozenset({INSIDE, "lost+found"})
"""Names that an empty volume may contain."""

Kind = Literal["absent", "empty", "checkpoint", "other"]
Entry = tuple[int, int, int]
"""Inode, bytes and mtime in nanoseconds of a file; for a directory only the inode."""


def looks_like_checkpoint(directory: Path) -> bool:
    """True for a directory that `--overwrite` may replace: it has both configs of a quantized model."""
    return all(os.path.isfile(directory / name) for name in ("config.json", "quantize_config.json"))


@dataclass(frozen=True, slots=True)
class Place:
    """A destination without links and relative parts, and the place of its working folder."""

    out: Path
    inside: bool
    """`out` is a directory that cannot be replaced by renaming, so files are moved into it."""

    @classmethod
    def of(cls, out: str | Path) -> Self:
        """The real path of `out`; nothing is changed."""
        real = Path(os.path.realpath(os.path.expanduser(out)))
        return cls(real, os.path.isdir(real) and (is_mount(real) or not may_be_renamed(real)))

    @property
    def folder(self) -> Path:
        """The working folder."""
        return self._inside if self.inside else self._beside

    @property
    def folders(self) -> tuple[Path, Path]:
        """Both places of working folders: this run's, and the one used if `out` is renamable for another
        run."""
        return (self._inside, self._beside) if self.inside else (self._beside, self._inside)

    @property
    def _beside(self) -> Path:
        return self.out.parent / f".{stem(self.out.name)}.gptq"

    @property
    def _inside(self) -> Path:
        return self.out / INSIDE

    @property
    def journal(self) -> Path:
        """The journal of an unfinished run, where there is one."""
        return self.folder / JOURNAL

    @property
    def is_begun(self) -> bool:
        """Whether a run has begun here, and has not removed its folder: it works, or has ended."""
        return is_ours(self.folder)

    def has_work(self) -> bool:
        """Whether a run ended here before its checkpoint was in place, and kept what it finished."""
        folder = self.folder
        if not is_ours(folder) or not all(os.path.isdir(folder / name) for name in (JOURNAL, RESULT)):
            return False
        return not is_placed(self.out, self.owner())

    @property
    def standing(self) -> Path:
        """The destination, or the old checkpoint that an interrupted run had moved aside from there."""
        old = self.folder / OLD
        return (
            old if not os.path.lexists(self.out) and os.path.isdir(old) and is_ours(self.folder) else self.out
        )

    def owner(self) -> Owner | None:
        """The run that owns the working folder."""
        return read_owner(self.folder)

    def check_free(self) -> None:
        """Raise `DestinationBusy` if another run is using the place. Writes nothing."""
        for folder in self.folders:
            owner = read_owner(folder)
            if not (owner and owner.is_this_process) and is_ours(folder) and is_held(folder):
                raise busy(self.out, folder)

    def left_over(self, *, done: bool) -> tuple[str, int]:
        """A sentence about what the run does, or has `done`, with an earlier run's leftovers; and the bytes
        it frees. Unfinished work is no leftover."""
        folder = self.folder
        names = (OLD,) if self.has_work() else (RESULT, OLD, JOURNAL, GRADIENTS)
        if not is_ours(folder) or not set(names) & set(os.listdir(folder)):
            return "", 0
        found = [name for name in names if self.standing != folder / name]
        size = sum(tree_bytes(folder / name) for name in found)
        left = f"{folder}, left by a run that ended ({self.owner()})"
        words = [f"{'removed' if done else 'the run will remove'} {left}: {format_size(size)}"]
        if self.standing != self.out:
            was = "was" if done else "will be"
            words.append(f"{self.out}, which that run had moved aside to replace it, {was} put back")
        return "; ".join(words), size


def may_be_renamed(directory: Path) -> bool:
    """Whether this process may rename the directory."""
    parent = directory.parent
    if not may_write(parent):
        return False
    try:
        above, own = os.stat(parent), os.stat(directory)
    except OSError:
        return False
    me = os.geteuid() if hasattr(os, "geteuid") else 0
    return not above.st_mode & stat.S_ISVTX or me in (0, above.st_uid, own.st_uid)


def may_write(directory: Path) -> bool:
    """Whether this process may create and remove names in a directory."""
    effective = os.access in os.supports_effective_ids
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK, effective_ids=effective)


def may_be_removed(directory: Path) -> bool:
    """Whether everything in a directory can be removed."""
    return all(may_write(Path(folder)) for folder, _, _ in os.walk(directory))


@dataclass(frozen=True, slots=True)
class State:
    """What is at a place: enough to decide later whether it is the same, unchanged."""

    kind: Kind
    identity: tuple[int, int] | None = None
    entries: dict[str, Entry] = field(default_factory=dict)

    def differences(self, now: State) -> tuple[str, ...]:
        """Names that are new, gone or changed."""
        names = self.entries.keys() | now.entries.keys()
        return tuple(sorted(n for n in names if self.entries.get(n) != now.entries.get(n)))


def state_of(path: Path, ignored: Iterable[str] = ()) -> State:
    """The state of a place. Raises `OSError` where it cannot be read."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return State("absent")
    identity = found.st_dev, found.st_ino
    if not stat.S_ISDIR(found.st_mode):
        return State("other", identity)
    try:
        names = sorted(set(os.listdir(path)) - set(ignored))
    except PermissionError:
        return State("other", identity)
    if not names:
        return State("empty", identity)
    if not looks_like_checkpoint(path):
        return State("other", identity, dict.fromkeys(names, (0, 0, 0)))
    entries: dict[str, Entry] = {}
    for folder, below, files in os.walk(path, onerror=_raise):
        for name in (*below, *files):
            full = os.path.join(folder, name)
            entry = os.lstat(full)
            directory = stat.S_ISDIR(entry.st_mode)
            numbers = (entry.st_ino, 0, 0) if directory else (entry.st_ino, entry.st_size, entry.st_mtime_ns)
            entries[os.path.relpath(full, path)] = numbers
    return State("checkpoint", identity, entries)


def _raise(error: OSError) -> None:
    raise error


def check_destination(out: Path, source: Path | None, *, overwrite: bool) -> None:
    """Raise `ConfigError` unless a checkpoint of the model in `source` may be put at `out`."""
    place = Place.of(out)
    if source is not None:
        model = source.resolve()
        if place.out == model or place.out in model.parents:
            raise ConfigError(
                f"out is {out}, which is or holds the model itself",
                hint="give --out a directory of its own",
            )
    there = place.standing
    kind = state_of(there, ignored_names(place)).kind
    if kind in ("absent", "empty"):
        return
    if not overwrite:
        raise ConfigError(f"out {out} exists", hint="choose another --out, or add --overwrite")
    if not there.is_dir():
        raise ConfigError(f"out {out} is a file; allowed: a directory", hint="choose another --out")
    if kind != "checkpoint":
        raise ConfigError(
            f"out {out} is not a checkpoint of a quantized model, so --overwrite does not touch it",
            hint="choose another --out, or remove the directory yourself",
        )
    if place.inside:
        raise ConfigError(
            f"out {out} cannot be renamed (a mount point, or not yours), so --overwrite cannot replace it",
            hint=f"choose another --out, such as {there / 'gptq'}, or empty the directory yourself",
        )


def is_empty(place: Place) -> bool:
    """Whether nothing is there except what an empty volume contains and leftovers of our own runs."""
    try:
        return set(os.listdir(place.standing)) <= ignored_names(place)
    except OSError:
        return False


def ignored_names(place: Place) -> frozenset[str]:
    """Names that do not count as content of the place."""
    if not place.inside:
        return frozenset()
    owner = place.owner()
    return NOT_CONTENT | {name for name, _ in placed_files(place.out, owner)}


def is_placed(out: Path, owner: Owner | None) -> bool:
    """Whether the checkpoint of that run is at `out`, complete: it ended between the last rename and its
    end."""
    if owner is None:
        return False
    try:
        if owner.placing:
            found = ((os.lstat(out / name), known) for name, known in owner.placing.items())
            return all((entry.st_ino, entry.st_size) == known for entry, known in found)
        return owner.moving != 0 and os.lstat(out).st_ino == owner.moving
    except OSError:
        return False


def placed_files(out: Path, owner: Owner | None) -> list[tuple[str, Path]]:
    """Files that the run of `owner` moved to `out` before it ended, without files that are newer. Empty where
    it had moved all of them, because then the checkpoint is complete.
    """
    planned = owner.placing if owner is not None else {}
    found = []
    for name, (inode, size) in planned.items():
        path = out / name
        with contextlib.suppress(OSError):
            entry = os.lstat(path)
            if os.path.basename(name) == name and (entry.st_ino, entry.st_size) == (inode, size):
                found.append((name, path))
    return found if len(found) < len(planned) else []
