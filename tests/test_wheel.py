"""The wheel holds all that the program needs beside its code, and the program runs from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gptq_cli import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gptq_cli"


def run(*words: object, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environ},
        cwd=environ.get("PYTHONPATH"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because a build leaves files beside its source."""
    pytest.importorskip("build", reason="a development dependency: make venv")
    pytest.importorskip("setuptools", minversion="77", reason="a development dependency: make venv")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(PACKAGE, source / "gptq_cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    (found,) = out.glob("*.whl")
    return found


def test_everything_in_the_package_is_in_the_wheel(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("gptq_cli/")}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert held == {str(path.relative_to(ROOT)) for path in files}
    for kind in ("presets/w4g128.toml", "schema/run_report.json", "py.typed"):
        assert f"gptq_cli/{kind}" in held


def test_the_installed_program_finds_its_presets_and_schemas(wheel: Path, tmp_path: Path) -> None:
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    script = (tmp_path / "bin" / "gptq").read_text(encoding="utf-8")
    assert "from gptq_cli.cli.app import main" in script
    here = {"PYTHONPATH": str(tmp_path)}
    assert run("-m", "gptq_cli", "--version", **here).startswith(f"gptq {__version__} ")
    assert '"presets": ["w4g128", "w4g32", "w8"]' in run("-m", "gptq_cli", "recipes", "--json", **here)
    code = "from gptq_cli.display.schemas import FOLDER; print(FOLDER, len(list(FOLDER.glob('*.json'))))"
    schemas = len(list((PACKAGE / "schema").glob("*.json")))
    assert run("-c", code, **here).split() == [str(tmp_path / "gptq_cli" / "schema"), str(schemas)]
