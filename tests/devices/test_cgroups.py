from __future__ import annotations

from pathlib import Path

from gptq_cli.devices.cgroups import ControlGroup, control_groups


def groups(root: Path, lines: str, controller: str) -> list[ControlGroup]:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    return list(control_groups(controller, root))


def test_v2_from_the_own_group_outwards(tmp_path: Path) -> None:
    base = tmp_path / "sys/fs/cgroup"
    assert groups(tmp_path, "0::/a/b\n", "memory") == [
        ControlGroup(base / "a/b", unified=True),
        ControlGroup(base / "a", unified=True),
        ControlGroup(base, unified=True),
    ]


def test_v1_has_a_hierarchy_per_controller(tmp_path: Path) -> None:
    lines = "5:cpu,cpuacct:/x\n4:memory:/\n3:cpuset:/y\n"
    base = tmp_path / "sys/fs/cgroup/cpu"
    assert groups(tmp_path, lines, "cpu") == [
        ControlGroup(base / "x", unified=False),
        ControlGroup(base, unified=False),
    ]


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert list(control_groups("memory", tmp_path)) == []
