"""As many threads as this process has cores.

OpenMP starts one thread per core of the affinity mask and ignores a container's CPU quota. The surplus
threads then wait for each other, and a matmul that should take 0.2 s takes 9 s.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity mask, and the quota of its control group."""
    return max(1, min([_cores_in_mask(), *(math.ceil(quota) for quota in _quotas(root))]))


def _cores_in_mask() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _quotas(root: Path) -> list[float]:
    """Cores allowed by each control group above this process; may be fractions."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            quota = _quota(base.joinpath(*parts[:depth]), unified=not controllers)
            if quota is not None:
                found.append(quota)
    return found


def _quota(group: Path, *, unified: bool) -> float | None:
    try:
        if unified:
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max": no quota
        return None


def cap_openmp_threads(environ: MutableMapping[str, str]) -> None:
    """Make OpenMP start one thread per usable core, where a quota allows fewer than it would count itself.

    OpenMP reads the environment when torch is imported, so call this before; a value already set is kept. The
    setting is process-wide, so only the command line makes it, never the library.
    """
    cores = usable_cores()
    if cores < _cores_in_mask():
        environ.setdefault("OMP_NUM_THREADS", str(cores))
