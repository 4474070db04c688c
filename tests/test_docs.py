"""docs/cli.md and docs/architecture.md are made from the program: its options, its floors, its docstrings.

`make golden` writes the parts between the markers.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml

import gptq_cli
from gptq_cli.cli.app import app
from gptq_cli.events import Phase
from tests.test_architecture import FLOORS, PACKAGE

ROOT = Path(__file__).parent.parent
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options_block() -> str:
    """One table a command: every option as `--help` has it, with its default."""
    parts = []
    for name, command in COMMANDS.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        heading = " ".join([f"gptq {name}", *(str(p.metavar).strip("{}") for p in arguments)])
        rows = [f"## {heading}", "", "| option | default | |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                rows.append(f"| `{_spelling(parameter)}` | {_default(parameter)} | {_text(parameter)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _spelling(parameter: Any) -> str:
    names = " / ".join([*parameter.opts, *parameter.secondary_opts])
    return f"{names} {parameter.metavar}".strip() if parameter.metavar else names


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.secondary_opts and value is not None:
        return f"`{parameter.opts[0] if value else parameter.secondary_opts[0]}`"
    return "" if value is None or value is False or value == "" else f"`{value}`"


def _text(parameter: Any) -> str:
    return " ".join(str(parameter.help).split()).replace("|", "\\|")


def tree_block() -> str:
    """Every module of the package with the first sentence of its docstring."""
    paths = sorted(PACKAGE.rglob("*.py"))
    modules = [path for path in paths if path.name not in ("__init__.py", "__main__.py")]
    lines = []
    for folder in [ROOT / "gptq_cli", *sorted({path.parent for path in modules} - {ROOT / "gptq_cli"})]:
        lines.append(f"{folder.relative_to(ROOT)}/")
        own = [path for path in modules if path.parent == folder]
        width = max(len(path.name) for path in own)
        lines += [f"  {path.name:<{width}}  {_phrase(path)}" for path in own]
    return "```\n" + "\n".join(lines) + "\n```"


def _phrase(path: Path) -> str:
    paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return re.split(r"(?<=[\w`)])\.(?:\s|$)", " ".join(paragraph.split()))[0]


def floors_block() -> str:
    """A row per room, the highest floor first, within a floor in the order of imports."""
    rows = ["| floor | room | |", "|---:|---|---|"]
    for number, rooms in reversed(list(enumerate(FLOORS))):
        for room in rooms:
            if (PACKAGE / room).is_dir():
                rows.append(f"| {number} | `{room}/` | {_phrase(PACKAGE / room / '__init__.py')} |")
            elif not room.startswith("_"):
                rows.append(f"| {number} | `{room}.py` | {_phrase(PACKAGE / f'{room}.py')} |")
    return "\n".join(rows)


GENERATED = {
    ("cli.md", "options"): options_block,
    ("architecture.md", "floors"): floors_block,
    ("architecture.md", "tree"): tree_block,
}


@pytest.mark.parametrize(("file", "name"), GENERATED)
def test_generated_parts_are_up_to_date(file: str, name: str) -> None:
    path = ROOT / "docs" / file
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin, written by `make golden` -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    found, after = rest.split(end)
    expected = f"\n{GENERATED[file, name]()}\n\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(before + begin + expected + end + after, encoding="utf-8")
        return
    assert found == expected, "if this is meant: make golden"


def test_every_phase_is_listed() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"The names of the phases are the same everywhere: ([^.]*)\.", text)
    assert re.findall(r"`(\w+)`", listed) == list(get_args(Phase))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_no_package_lists_its_modules_by_hand(path: Path) -> None:
    """docs/architecture.md has that list, and it is generated."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    names = {other.name for other in path.parent.glob("*.py")}
    assert not names & set(re.findall(r"\b\w+\.py\b", text))
    assert text


def test_the_changelog_has_this_version_first() -> None:
    versions = re.findall(
        r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert gptq_cli.__version__ in versions
    assert numbers == sorted(numbers, reverse=True)


def test_hosted_ci_runs_what_make_check_runs_on_every_python() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text(encoding="utf-8"))["jobs"]["check"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make check PYTHON=python"]
    matrix = job["strategy"]["matrix"]
    oldest = re.search(r'requires-python = ">=(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert oldest is not None
    assert matrix["python"][0] == oldest[1]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name
)
def test_every_table_has_a_header(path: Path) -> None:
    """An empty line inside a table would leave its second half without one."""
    lines = ["", *re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8")).splitlines(), ""]
    begun = [
        at for at, line in enumerate(lines) if line.startswith("|") and not lines[at - 1].startswith("|")
    ]
    assert [lines[at] for at in begun if not re.fullmatch(r"\|[-:| ]+\|", lines[at + 1])] == []
