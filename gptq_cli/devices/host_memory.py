"""Main memory that this process may use.

In a container the kernel's "available" is the machine's; the control group's limit is the container's, so the
smaller of the two counts. The peak is `VmHWM`, which belongs to this process image: `ru_maxrss` survives
`exec` on Linux, so it may report the size of the parent process, and it cannot be reset for a second job.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from gptq_cli.devices.cgroups import control_groups

_UNLIMITED = 1 << 60
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of main memory: what this process may use, and how much of it is free."""

    total_bytes: int
    free_bytes: int


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Total and free main memory, under the control group's limit where there is one."""
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return HostMemory(total, free)


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used without reclaimable cache) of each limited control group above this process."""
    found: list[tuple[int, int]] = []
    for group in control_groups("memory", root):
        most, used_now, cache = _CGROUP_V2 if group.unified else _CGROUP_V1
        limit, used = _read_number(group.folder / most), _read_number(group.folder / used_now)
        if limit is not None and used is not None and limit < _UNLIMITED:
            found.append((limit, max(0, used - _read_stat(group.folder / "memory.stat", cache))))
    return found


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_stat(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key and value.isdigit():
                return int(value)
    except OSError:
        return 0
    return 0


def resident_bytes() -> int:
    """Resident set size of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Highest resident set size of this process so far, or since `reset_peak_resident`."""
    if sys.platform == "linux":
        peak = _read_kib(Path("/proc/self/status"), "VmHWM:")
        if peak is not None:
            return max(peak, resident_bytes())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, resident_bytes())


def reset_peak_resident() -> int:
    """Start a new peak where the system allows it (Linux), and return the peak afterwards.

    A later peak that is not above the returned one may be older than this call: only Linux resets it, and a
    container may forbid that. Call this once per job and not once per block, because tools that measure the
    process from outside (`time`, a scheduler) read the same value.
    """
    with suppress(OSError):  # the returned peak shows it
        _CLEAR_REFS.write_text("5")  # proc(5): the peak becomes the current size
    return peak_resident_bytes()


def _read_kib(path: Path, key: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None


def limit_malloc_arenas() -> None:
    """Keep the resident set close to the memory in use, where the C library can (glibc); else do nothing.

    Parked forwards allocate in one thread and free in another. glibc gives each thread an arena of its own
    and keeps freed memory there, and its threshold for returning large blocks grows with use: the same run
    then holds half as much memory again. One arena and a fixed threshold prevent both. The setting is
    process-wide, so only the command line makes it, never the library.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (
            (_M_ARENA_MAX, 1),
            (_M_MMAP_THRESHOLD, 4 << 20),
            (_M_TRIM_THRESHOLD, 64 << 20),
        ):
            mallopt(parameter, value)


def trim_heap() -> None:
    """Give freed heap pages back to the system where the C library can (glibc); else do nothing."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
