"""Where things are kept for later runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_cli.user_cache import cache_directory, written_beside


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPTQ_CACHE", "~/texts")
    assert cache_directory() == Path("~/texts").expanduser()
    monkeypatch.delenv("GPTQ_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "hf" / "gptq"
    monkeypatch.delenv("HF_HOME")
    assert cache_directory() == tmp_path / "xdg" / "gptq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path("~/.cache/gptq").expanduser()


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    place = tmp_path / "bits" / "a.json"
    with written_beside(place) as beside:
        beside.write_text("whole")
    with pytest.raises(KeyboardInterrupt), written_beside(place) as beside:
        beside.write_text("hal")
        raise KeyboardInterrupt
    assert place.read_text() == "whole"
    assert list(place.parent.iterdir()) == [place]
