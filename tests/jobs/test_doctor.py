"""`gptq doctor` on a machine where something cannot be read."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from gptq_cli.jobs.doctor import doctor


def test_a_token_in_a_closed_directory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/token")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/closed/token")
    monkeypatch.setattr(huggingface_hub, "get_token", closed)
    (hub,) = (check for check in doctor().checks if check.name == "hub")
    assert (hub.found, hub.verdict) == (
        "the token cannot be read: permission denied: /closed/token",
        "warning",
    )
    assert "HF_TOKEN" in hub.advice


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        ("new/hub", ("{}/new/hub", "good")),
        ("file/hub", ("{0}/file/hub cannot be written to: {0}/file", "warning")),
        ("file", ("{}/file cannot be written to", "warning")),
    ],
)
def test_a_cache_that_takes_no_files_is_told(
    cache: str, says: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / cache))
    (found,) = (check for check in doctor().checks if check.name == "hub cache")
    assert (found.found, found.verdict) == (says[0].format(tmp_path), says[1])
    assert not (tmp_path / "new").exists()


def test_a_cache_behind_a_closed_directory_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a link into a directory of somebody else."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "closed" / "hub")
    stat = os.stat

    def refused(path: Any, *words: Any, **options: Any) -> os.stat_result:
        if str(path) == str(link) and options.get("follow_symlinks", True):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *words, **options)

    monkeypatch.setattr(os, "stat", refused)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(link))
    (found,) = (check for check in doctor().checks if check.name == "hub cache")
    assert (found.found, found.verdict) == (f"{link} cannot be written to", "warning")
