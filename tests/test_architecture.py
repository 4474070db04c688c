"""The floors hold: imports only go down, the vocabulary is plain Python, the front does not wake torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gptq_cli

PACKAGE = Path(gptq_cli.__file__).parent
FLOORS = {
    "config": 0,
    "device": 0,
    "device_grammar": 0,
    "device_map": 0,
    "device_rules": 0,
    "errors": 0,
    "events": 0,
    "files": 0,
    "findings": 0,
    "placement": 0,
    "proof": 0,
    "results": 0,
    "gptq": 1,
    "calibration": 2,
    "devices": 2,
    "engine": 2,
    "inference": 2,
    "model": 2,
    "preflight": 2,
    "jobs": 3,
    "run_report": 3,
    "cli": 4,
    "display": 4,
    "report": 4,
    "__main__": 4,
}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
ROOMS = [path for path in MODULES if path != Path("__init__.py")]
HEAVY = ("torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")
LINES, LINES_OF_MATHS = 440, 220
"""About 400 and 200: a module that grows past them has become two."""


def room_of(path: Path) -> str:
    """`engine/loop.py` -> `engine`; `events.py` -> `events`."""
    return path.parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Every name that a module imports, anywhere in it; `from gptq_cli import jobs` is `gptq_cli.jobs`."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "gptq_cli":
                yield from (f"gptq_cli.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


@pytest.mark.parametrize("path", ROOMS, ids=str)
def test_imports_only_go_down(path: Path) -> None:
    floor = FLOORS[room_of(path)]
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "gptq_cli" and rest and rest[0] in FLOORS:
            assert FLOORS[rest[0]] <= floor, (
                f"{path} (floor {floor}) imports {name} (floor {FLOORS[rest[0]]})"
            )


def test_the_check_above_can_fail() -> None:
    assert "gptq_cli.jobs" in set(imports_of(Path("cli/quantize.py")))
    assert FLOORS["jobs"] > FLOORS["engine"]


@pytest.mark.parametrize("path", [path for path in ROOMS if FLOORS[room_of(path)] <= 1], ids=str)
def test_the_vocabulary_is_plain_python_and_the_maths_knows_torch_alone(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "_typeshed", "gptq_cli"} | (
        {"torch"} if FLOORS[room_of(path)] == 1 else set()
    )
    assert {name.partition(".")[0] for name in imports_of(path)} <= allowed


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_stay_small_and_are_named_for_what_they_hold(path: Path) -> None:
    lines = len((PACKAGE / path).read_text(encoding="utf-8").splitlines())
    assert lines <= (LINES_OF_MATHS if room_of(path) == "gptq" else LINES)
    assert path.stem not in ("utils", "common", "helpers", "misc")
    assert "click" not in {name.partition(".")[0] for name in imports_of(path)}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    tail = "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_command_line_wakes_nothing_heavy() -> None:
    loaded = modules_after("import gptq_cli.cli.app")
    assert "typer" in loaded
    assert not loaded & {*HEAVY, "rich"}


def test_help_and_usage_errors_wake_nothing_heavy() -> None:
    code = "from gptq_cli.cli.app import main\nassert main({argv!r}) == {code}"
    assert not modules_after(code.format(argv=["quantize", "--help"], code=0)) & set(HEAVY)
    assert not modules_after(code.format(argv=["quantize", "M", "--out", "O", "--bits", "5"], code=2)) & set(
        HEAVY
    )


def test_importing_the_package_wakes_nothing_at_all() -> None:
    assert not modules_after("import gptq_cli") & {*HEAVY, "rich", "typer"}
