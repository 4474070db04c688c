"""The control groups of this process: where the kernel writes down what a container may use.

    v2  one hierarchy, `0::/path` in /proc/self/cgroup, all files in /sys/fs/cgroup/path
    v1  a hierarchy per controller, `4:cpu,cpuacct:/path`, files in /sys/fs/cgroup/cpu/path

A limit holds for everything below it, so each group above this process counts. A container often sees only
its own part of the tree: a path that does not exist there has no files, and the walk ends at the mount, which
does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """One control group above this process, or its own."""

    folder: Path
    """Where its files are; it need not exist."""
    unified: bool
    """Version 2 of the file names (`memory.max`) and not version 1 (`memory.limit_in_bytes`)."""


def control_groups(controller: str, root: Path) -> Iterator[ControlGroup]:
    """Groups that `controller` ("memory", "cpu") may limit this process by, from its own outwards.

    Yields nothing where there is no /proc/self/cgroup (macOS).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            yield ControlGroup(base.joinpath(*parts[:depth]), unified=not controllers)
