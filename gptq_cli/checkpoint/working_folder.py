"""The working folder of a run: its name, its lock, its owner, and what an earlier run left in it.

For the destination `models/q` it is `models/.q.gptq`, however the destination is spelled:

    .q.gptq/
      lock        locked with flock while the run lives; kill -9 releases it
      run.json    the owner: process, machine, start time, and what is about to be moved to the destination.
                  It marks the folder as ours
      run-copy.json  the same once more: it counts where run.json is damaged or gone
      result/     the checkpoint being written
      journal/    which blocks of it are finished, see `journal.py`
      gradients/  those of the dense model, see `kept_states.py`
      old/        the checkpoint that --overwrite replaced, about to be removed

Where a run ended before its checkpoint was in place and a block was finished, or the gradients were taken,
the folder stays: the same command run again goes on. It may be removed at any time, and is when the
checkpoint is in place. A folder of that name without our `run.json` or its copy is not ours and is never
touched; in a folder of ours, only the names above are ever removed. The journal alone does not make it ours:
it says neither what of the result was already moved, nor whether the folder was left to the user.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from gptq_cli.checkpoint.renames import fsync
from gptq_cli.errors import ConfigError, DestinationBusy

LOCK, SOFT_LOCK = "lock", "lock.soft"
MARKER, MARKER_COPY, MARKER_NEW = "run.json", "run-copy.json", "run.json.new"
RESULT, OLD, JOURNAL, GRADIENTS = "result", "old", "journal", "gradients"
INSIDE = ".gptq"
"""The folder's name where it must be inside the destination."""
_TOOL = "gptq-cli"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_PATIENCE_SECONDS = 0.5
"""A run that only checks the lock holds it for a moment, and so does a run that is about to end."""
_STEM_BYTES = 100
_MARKER_LIMIT_BYTES = 1 << 20
_TRIES = 20


def stem(name: str) -> str:
    """`name`, shortened so that our additions fit the file system's limit, but different for every name."""
    if len(os.fsencode(name)) <= _STEM_BYTES:
        return name
    short = name[:_STEM_BYTES]
    while len(os.fsencode(short)) > _STEM_BYTES:
        short = short[:-1]
    return f"{short}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class Owner:
    """The run that uses, or used, a folder."""

    pid: int
    host: str
    started: str
    """ISO 8601, with the offset from UTC."""
    out: str
    placing: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Files that are being moved to the destination one by one: name -> (inode, bytes)."""
    moving: int = 0
    """Inode of the checkpoint that is about to be renamed to the destination; 0 before that."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started[:19].replace('T', ' ')}"

    @classmethod
    def of_this_process(cls, out: Path) -> Self:
        """This process, from now on."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), now, str(out))

    @property
    def is_this_process(self) -> bool:
        """Whether it is this process."""
        return self.pid == os.getpid() and self.host == socket.gethostname()


def read_owner(folder: Path) -> Owner | None:
    """The owner of the folder; None where it is not a working folder of ours."""
    return _marked_by(folder / MARKER) or _marked_by(folder / MARKER_COPY)


def marker_problem(folder: Path) -> str:
    """What is wrong with the marker of a folder whose copy of it is read instead; "" where nothing is."""
    if _marked_by(folder / MARKER) is not None or _marked_by(folder / MARKER_COPY) is None:
        return ""
    what = "damaged" if os.path.lexists(folder / MARKER) else "gone"
    return f"{folder / MARKER} is {what}; its copy is used"


def _marked_by(path: Path) -> Owner | None:
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MARKER_LIMIT_BYTES:
            return None
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["tool"] != _TOOL:
            return None
        placing = {str(n): (int(i), int(s)) for n, (i, s) in content.get("placing", {}).items()}
        return Owner(
            int(content["pid"]),
            str(content["host"]),
            str(content["started"]),
            str(content["out"]),
            placing,
            int(content.get("moving", 0)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # we did not write this file


def is_ours(folder: Path) -> bool:
    """True for a working folder of this tool, also for one that a run had only just created when it ended."""
    if os.path.islink(folder) or not os.path.isdir(folder):
        return False
    try:
        return set(os.listdir(folder)) <= {LOCK, SOFT_LOCK, MARKER_NEW} or read_owner(folder) is not None
    except OSError:
        return False


def is_taken(folder: Path) -> bool:
    """True where something that is not ours has the working folder's name."""
    return os.path.lexists(folder) and not is_ours(folder)


def why_taken(folder: Path) -> str:
    """Why a folder that `is_taken` cannot be used, as a clause."""
    signs = (MARKER, MARKER_COPY, os.path.join(JOURNAL, "manifest.json"))
    inside = os.path.isdir(folder / JOURNAL) or os.path.isdir(folder / RESULT)
    if inside and any(os.path.isfile(folder / name) for name in signs):
        return (
            f"neither its {MARKER} nor the copy of it can be read, so its work is not gone on with, and "
            "nothing in it is removed"
        )
    return "no run made it"


def is_held(folder: Path) -> bool:
    """Whether a live run uses the folder. Writes nothing."""
    if (folder / SOFT_LOCK).exists():
        owner = read_owner(folder)
        return owner is None or owner.host != socket.gethostname() or psutil.pid_exists(owner.pid)
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK, fallback_to_soft=False, thread_local=False)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False  # no locks here, or not our file: `claim` will report it


def busy(out: Path, folder: Path, reason: str = "") -> DestinationBusy:
    """The error for a destination that another run is using."""
    owner = read_owner(folder)
    why = f" ({reason})" if reason else ""
    return DestinationBusy(
        f"{out} is being written by another run: {owner or 'one that has just begun'}{why}",
        hint=f"wait for it, end it (kill {owner.pid} on {owner.host}), or give another --out"
        if owner is not None
        else "wait for it, or give another --out",
    )


class WorkingFolder:
    """The folder at `path`, held by this process from `claim` to `release`."""

    def __init__(self, path: Path, out: Path) -> None:
        self.path, self.out = path, out
        self.result, self.old, self.journal = path / RESULT, path / OLD, path / JOURNAL
        self.gradients = path / GRADIENTS
        self.unlocked = ""
        """Why there is no kernel lock; "" where there is one."""
        self._lock: BaseFileLock | None = None
        self._owner = Owner.of_this_process(out)

    def claim(self) -> Owner | None:
        """Create the folder, or take over one whose run has ended; return its earlier owner.

        Raises `DestinationBusy` if a live run uses it, `ConfigError` where something else has its name, and
        `OSError`.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(FileExistsError):
                self.path.mkdir()
            if is_taken(self.path):
                raise ConfigError(
                    f"{self.path} is in the way: the working folder needs this name, but "
                    f"{why_taken(self.path)}",
                    hint="rename it, or give another --out",
                )
            try:
                self._lock = self._acquired()
            except FileNotFoundError:  # the run before us removed the folder as its last step: try again
                continue
            if os.path.lexists(self._lock.lock_file):
                return read_owner(self.path)
            self._lock.release(force=True)
        raise busy(self.out, self.path)

    def mark(self, placing: dict[str, tuple[int, int]] | None = None, moving: int = 0) -> None:
        """Record the owner, and the files, or the inode of the directory, about to be moved to the
        destination."""
        owner = self._owner
        content = {
            "tool": _TOOL,
            "pid": owner.pid,
            "host": owner.host,
            "started": owner.started,
            "out": owner.out,
            "placing": placing or {},
            "moving": moving,
        }
        new, text = self.path / MARKER_NEW, json.dumps(content, indent=2) + "\n"
        for name in (MARKER, MARKER_COPY):  # nothing is moved before both say so: either may be believed
            new.write_text(text, encoding="utf-8")
            fsync(new)
            new.replace(self.path / name)
        fsync(self.path)

    def unmark(self) -> None:
        """Leave the folder and its content to the user: no later run will treat it as ours."""
        for name in (MARKER_COPY, MARKER):
            (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what a run creates here, except lock and markers. Raises `OSError`."""
        for path in (self.journal, self.result, self.old, self.gradients):
            remove(path)  # the journal first: it speaks of the result

    def release(self) -> None:
        """Remove the folder and release the lock, in an order that leaves no moment for another run."""
        for name in (MARKER_NEW, MARKER_COPY, MARKER, LOCK):
            (self.path / name).unlink(missing_ok=True)
        self.let_go()

    def let_go(self) -> None:
        """Release the lock; an empty folder is removed, any other stays as it is."""
        with contextlib.suppress(
            OSError
        ):  # it holds files that are not ours, or the next run uses it already
            self.path.rmdir()
        if self._lock is not None:
            self._lock.release(force=True)
            with contextlib.suppress(OSError):  # a soft lock is a file that its release removes
                if self.unlocked:
                    self.path.rmdir()
            self._lock = None

    def _acquired(self) -> BaseFileLock:
        lock: BaseFileLock = FileLock(self.path / LOCK, fallback_to_soft=False, thread_local=False)
        try:
            lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.02)
            return lock
        except Timeout:
            raise busy(self.out, self.path) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.unlocked = f"this file system has no locks ({error.strerror})"
        (self.path / LOCK).unlink(missing_ok=True)
        lock = SoftFileLock(self.path / SOFT_LOCK, thread_local=False)
        try:
            lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.02)
            return lock
        except Timeout:
            reason = f"{self.unlocked}: if that run has ended, remove {self.path / SOFT_LOCK}"
            raise busy(self.out, self.path, reason) from None


def remove(path: Path) -> None:
    """Remove a file or a directory tree, but never the target of a link. Does nothing if there is nothing."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tree_bytes(path: Path) -> int:
    """Bytes that the files of a directory take on the disk."""
    found = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                found += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return found
