"""The floors hold: imports only go down, the vocabulary is plain Python, the front does not wake torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gptq_cli

PACKAGE = Path(gptq_cli.__file__).parent
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "findings",
        "rules",
        "wording",
        "timing",
        "errors",
        "files",
        "user_cache",
        "fields",
        "placement",
        "readers",
        "module_settings",
        "text_sources",
        "recipes",
        "config",
        "load_job",
        "results",
        "events",
    ),
    ("gptq",),
    (
        "devices",
        "ranks",
        "model",
        "calibration",
        "targets",
        "checkpoint",
        "evaluation",
        "inference",
        "engine",
    ),
    ("planning", "preflight"),
    ("jobs",),
    ("display", "report", "api", "cli", "__main__"),
)
"""From the ground up; within a floor, a room may import those that stand before it."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ORDER = {room: place for place, room in enumerate(room for rooms in FLOORS for room in rooms)}
UNKNOWN_TO_ITS_FLOOR = frozenset({"inference"})
"""Rooms that nobody on their own floor imports."""
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
ROOMS = [path for path in MODULES if path != Path("__init__.py")]
HEAVY = ("torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")
LINES, LINES_OF_MATHS = 400, 200
"""A module that grows past them has become two."""


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
            if node.module != "gptq_cli":
                yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of_imports(path: Path) -> Iterator[tuple[str, str]]:
    """(room, dotted name) of every import of the package that leaves the module's own room."""
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "gptq_cli" and rest and rest[0] in ORDER and rest[0] != room_of(path):
            yield rest[0], name


def test_every_room_stands_on_a_floor() -> None:
    assert {room_of(path) for path in ROOMS} == set(ORDER)


@pytest.mark.parametrize("path", ROOMS, ids=str)
def test_imports_only_go_down(path: Path) -> None:
    own = room_of(path)
    for room, name in rooms_of_imports(path):
        assert ORDER[room] < ORDER[own], f"{path} imports {name}, and {room} stands above {own}"
        same_floor = FLOOR[room] == FLOOR[own]
        assert not (same_floor and room in UNKNOWN_TO_ITS_FLOOR), f"{path} imports {name}"


def test_the_check_above_can_fail() -> None:
    assert ("jobs", "gptq_cli.jobs") in set(rooms_of_imports(Path("cli/quantize.py")))
    assert ORDER["jobs"] > ORDER["engine"]
    assert ORDER["preflight"] > ORDER["planning"]


def test_no_two_modules_import_each_other() -> None:
    """Neither at once nor by a detour; the package's own `__init__` is left out: it opens jobs when asked."""
    known = {".".join(("gptq_cli", *path.with_suffix("").parts)): path for path in ROOMS}
    below = {name: {other for other in imports_of(path) if other in known} for name, path in known.items()}
    ready = TopologicalSorter(below)
    ready.prepare()


@pytest.mark.parametrize("path", [path for path in ROOMS if FLOOR[room_of(path)] <= 1], ids=str)
def test_the_vocabulary_is_plain_python_and_the_maths_knows_torch_alone(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "_typeshed", "gptq_cli"}
    allowed |= {"torch"} if FLOOR[room_of(path)] == 1 else set()
    allowed |= {"triton"} if path == Path("gptq/walk_triton.py") else set()
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


def test_explaining_a_rule_wakes_no_torch() -> None:
    code = "from gptq_cli.cli.app import main\nassert main(['inspect-map', '--explain', {rule!r}]) == 0"
    for rule in ("memory-budget", "four-bits-only", "scales-finite"):
        assert not modules_after(code.format(rule=rule)) & {*HEAVY}


def test_importing_the_package_wakes_nothing_at_all() -> None:
    assert not modules_after("import gptq_cli") & {*HEAVY, "rich", "typer"}
