from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptq_cli.devices import host_threads
from gptq_cli.devices.host_threads import cap_openmp_threads, usable_cores, waited_seconds


@pytest.fixture
def mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/d\n",
                "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/d\n",
                "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_mask_and_quota(files: dict[str, str], cores: int, tmp_path: Path, mask: None) -> None:
    assert usable_cores(write(tmp_path, files)) == cores


def test_a_quota_is_told_to_openmp_unless_it_was_told(monkeypatch: pytest.MonkeyPatch, mask: None) -> None:
    environ: dict[str, str] = {}
    monkeypatch.setattr(host_threads, "usable_cores", lambda: 8)
    cap_openmp_threads(environ)
    assert environ == {}
    monkeypatch.setattr(host_threads, "usable_cores", lambda: 2)
    cap_openmp_threads(environ)
    assert environ == {"OMP_NUM_THREADS": "2"}
    asked = {"OMP_NUM_THREADS": "4"}
    cap_openmp_threads(asked)
    assert asked == {"OMP_NUM_THREADS": "4"}


def test_waiting_is_summed_over_the_threads(tmp_path: Path) -> None:
    tasks = write(tmp_path, {"7/schedstat": "500 2000000000 3\n", "8/schedstat": "1 500000000 1\n"})
    (tasks / "9").mkdir()  # a thread that ended
    assert waited_seconds(tasks) == 2.5


@pytest.mark.parametrize("files", [None, {"7/schedstat": "?\n"}])
def test_a_system_that_does_not_tell(files: dict[str, str] | None, tmp_path: Path) -> None:
    tasks = tmp_path / "task" if files is None else write(tmp_path, files)
    assert waited_seconds(tasks) is None
