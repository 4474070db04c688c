"""Where there can be no make-believe CUDA, one line says why, and that is no failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakecuda import build
from tests.fakecuda.build import library, torch_version, why_not


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setattr(build, "compiler", lambda: None)


@pytest.mark.usefixtures("nothing_built")
@pytest.mark.skipif(sys.platform != "linux", reason="another reason comes first")
def test_without_a_compiler() -> None:
    assert "no C++ compiler" in (why_not() or "") or "CPU build" in (why_not() or "")


def test_on_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert why_not() == "it is made for Linux, and this is darwin"


def test_with_a_torch_that_has_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cu130'\n")
    monkeypatch.setattr(build, "torch_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "torch 2.13.0+cu130 is a build with libtorch_cuda.so" in (why_not() or "")


def test_a_library_belongs_to_a_source_and_a_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = library()
    assert torch_version()
    monkeypatch.setattr(build, "torch_version", lambda: "9.9.9+cpu")
    assert library() != here
    monkeypatch.undo()
    (tmp_path / "other.cpp").write_text(build.SOURCE.read_text() + "\n// changed\n")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "other.cpp")
    assert library() != here


def test_the_command_says_it_in_one_line_and_is_content() -> None:
    """Whatever the reason: with a compiler that is not there, unless something was built already."""
    code = (
        "from pathlib import Path; from tests.fakecuda import __main__, build; "
        "build.CACHE = Path('/nowhere'); raise SystemExit(__main__.main([]))"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "PYTHONPATH": str(build.CACHE.parent)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("make-believe CUDA: skipped, ")
    assert ran.stdout.count("\n") == 1
    assert ran.stderr == ""
