"""Two names exchanged at once, a name taken only where it is free, and what is mounted where."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.checkpoint import renames
from gptq_cli.checkpoint.renames import exchange, is_mount, rename_to_free


def pair(tmp_path: Path) -> tuple[Path, Path]:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone exchanges")
def test_exchange(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    if not exchange(a, b):
        pytest.skip("this file system cannot exchange")
    assert (os.listdir(a), os.listdir(b)) == (["b"], ["a"])
    with pytest.raises(FileNotFoundError):
        exchange(a, tmp_path / "c")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_exchange(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair(tmp_path)

    def refuses(*words: Any) -> int:
        renames.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(renames, "_system_call", lambda: refuses)
    assert not exchange(a, b)
    assert (os.listdir(a), os.listdir(b)) == (["a"], ["b"])
    rename_to_free(a, tmp_path / "c")
    with pytest.raises(FileExistsError):
        rename_to_free(b, tmp_path / "c")


def test_a_name_is_taken_only_where_it_is_free(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    (tmp_path / "empty").mkdir()
    for taken in (b, tmp_path / "empty"):
        with pytest.raises(FileExistsError):
            rename_to_free(a, taken)
    rename_to_free(a, tmp_path / "c")
    assert os.listdir(tmp_path / "c") == ["a"]


def test_bind_mounts_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.path.ismount misses a bind mount of the same file system; the table of mounts has it, escaped."""
    point = tmp_path / "my volume"
    point.mkdir()
    table = tmp_path / "mountinfo"
    escaped = str(point).replace(" ", r"\040")
    table.write_text(f"36 35 98:0 /data {escaped} rw,noatime shared:1 - ext4 /dev/root rw\n")
    monkeypatch.setattr(renames, "_MOUNTS", table)
    assert is_mount(point)
    assert not is_mount(tmp_path)
    assert is_mount(Path("/"))
