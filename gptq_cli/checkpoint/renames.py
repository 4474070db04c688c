"""What `os` lacks: exchanging two names in one step, taking a name if it is free; mounts; room for files.

Linux has both in `renameat2` (glibc 2.28), which Python does not expose. On other systems, and on file
systems without support, the functions say so and the caller does it in more steps.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that say that there is no room."""
_MOUNTS = Path("/proc/self/mountinfo")


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories or files in one step.

    Returns False, having done nothing, where the system or the file system cannot. Raises `OSError`.
    """
    return _renameat2(first, second, _RENAME_EXCHANGE)


def rename_to_free(source: Path, target: Path) -> None:
    """Rename without replacing anything: raises `FileExistsError` where `target` exists."""
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def is_mount(path: Path) -> bool:
    """Whether something is mounted on `path`, bind mounts of the same file system included."""
    if os.path.ismount(path):
        return True
    try:
        text = os.fsdecode(_MOUNTS.read_bytes())
    except OSError:
        return False  # not Linux: there are no bind mounts
    points = (line.split(" ")[4] for line in text.splitlines() if line.count(" ") > 4)
    return os.path.realpath(path) in {re.sub(r"\\([0-7]{3})", _unescaped, point) for point in points}


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 8))


def reserve(handle: int, size_bytes: int) -> None:
    """Give an open file its full size, and allocate its blocks where the file system can. Raises `OSError`
    where there is no room."""
    os.ftruncate(handle, size_bytes)
    if hasattr(os, "posix_fallocate") and size_bytes:
        try:
            os.posix_fallocate(handle, 0, size_bytes)
        except OSError as error:
            if error.errno in FULL:
                raise


def fsync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot do this for directories
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    call = _system_call()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@cache
def _system_call() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function
