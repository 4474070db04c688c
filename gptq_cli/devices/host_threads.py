"""As many threads as this process has cores.

OpenMP starts one thread per core of the affinity mask and ignores a container's CPU quota. The surplus
threads then wait for each other, and a matmul that should take 0.2 s takes 9 s.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

from gptq_cli.devices.cgroups import ControlGroup, control_groups


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity mask, and the quota of its control group."""
    quotas = [quota for group in control_groups("cpu", root) if (quota := _quota(group)) is not None]
    return max(1, min([_cores_in_mask(), *(math.ceil(quota) for quota in quotas)]))


def _cores_in_mask() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _quota(group: ControlGroup) -> float | None:
    """Cores that a control group allows, in fractions; None where it sets no limit."""
    try:
        if group.unified:
            limit, period = (group.folder / "cpu.max").read_text().split()
        else:
            limit = (group.folder / "cpu.cfs_quota_us").read_text().strip()
            period = (group.folder / "cpu.cfs_period_us").read_text().strip()
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max": no quota
        return None


def waited_seconds(tasks: Path = Path("/proc/self/task")) -> float | None:
    """How long the threads of this process, all together, were ready to run and waited for a processor since
    they began. None where the system does not tell."""
    waited = 0
    try:
        for thread in tasks.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                waited += int((thread / "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return waited / 1e9


def cap_openmp_threads(environ: MutableMapping[str, str]) -> None:
    """Make OpenMP start one thread per usable core, where a quota allows fewer than it would count itself.

    OpenMP reads the environment when torch is imported, so call this before; a value already set is kept. The
    setting is process-wide, so only the command line makes it, never the library.
    """
    cores = usable_cores()
    if cores < _cores_in_mask():
        environ.setdefault("OMP_NUM_THREADS", str(cores))
