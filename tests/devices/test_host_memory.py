"""Main memory under control groups of both versions, on a file system made for it."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from gptq_cli.devices.host_memory import (
    host_memory,
    peak_resident_bytes,
    resident_bytes,
    trim_heap,
)

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_without_control_groups(tmp_path: Path) -> None:
    found = host_memory(tmp_path)
    assert found.total_bytes == psutil.virtual_memory().total
    assert 0 < found.free_bytes <= found.total_bytes


def test_version_2_counts_the_tightest_group_above(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/job\n",
            "sys/fs/cgroup/pod/job/memory.max": "max\n",
            "sys/fs/cgroup/pod/job/memory.current": "1\n",
            "sys/fs/cgroup/pod/memory.max": f"{200 * MIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{150 * MIB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {50 * MIB}\n",
        },
    )
    assert (host_memory(root).total_bytes, host_memory(root).free_bytes) == (200 * MIB, 100 * MIB)


def test_version_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{300 * MIB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{100 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        },
    )
    assert (host_memory(root).total_bytes, host_memory(root).free_bytes) == (300 * MIB, 200 * MIB)


def test_a_full_group_has_nothing_free(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{100 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{120 * MIB}\n",
        },
    )
    assert host_memory(root).free_bytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_follows_and_stays() -> None:
    before = peak_resident_bytes()
    assert before >= resident_bytes() > 0
    grown = bytearray(64 * MIB + max(0, before - resident_bytes()))
    grown[::4096] = b"x" * len(grown[::4096])
    at_top = resident_bytes()
    del grown
    trim_heap()
    assert at_top > before
    assert peak_resident_bytes() > at_top - MIB, "the kernel counts pages in batches"
