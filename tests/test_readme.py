"""README says what the program does: its options, its exit codes, its files, its commands.

`make golden` writes the generated parts (between the markers); everything else is checked as it stands.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gptq_cli import errors
from gptq_cli.cli.app import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options_block() -> str:
    """One table a command: every option as `--help` has it, with its default."""
    parts = []
    for name, command in COMMANDS.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        heading = " ".join([f"gptq {name}", *(str(p.metavar).strip("{}") for p in arguments)])
        rows = [f"#### {heading}", "", "| option | default | |", "|---|---|---|"]
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
    paths = sorted((ROOT / "gptq_cli").rglob("*.py"), key=lambda path: (len(path.parts) > 0, path.parts))
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


GENERATED = {"options": options_block, "tree": tree_block}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_up_to_date(name: str) -> None:
    text = README.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin, written by `make golden` -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    found, after = rest.split(end)
    expected = f"\n{GENERATED[name]()}\n\n"
    if os.environ.get("UPDATE_GOLDEN"):
        README.write_text(before + begin + expected + end + after, encoding="utf-8")
        return
    assert found == expected, "if this is meant: make golden"


def _console_lines(prefix: str) -> Iterator[list[str]]:
    """Words of every `$ prefix …` line in README, CONTRIBUTING and the presets' comments."""
    pattern = re.compile(rf"^(?:\$|#)\s+({prefix} .*)$", re.MULTILINE)
    for path in (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "configs").glob("*.toml"))):
        for line in pattern.findall(path.read_text(encoding="utf-8")):
            yield shlex.split(line, comments=True)


def test_every_command_line_is_one_that_parses() -> None:
    lines = list(_console_lines("gptq"))
    assert len(lines) >= 9
    for words in lines:
        command = COMMANDS[words[1]]
        own = words[2 : min((words.index(sign) for sign in (">", "2>", "|") if sign in words), default=None)]
        known = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
        for word in own:
            if word.startswith("--"):
                assert word in known, f"{' '.join(words)}: no option {word}"
        assert own[0] in ("MODEL", "DIR"), words


def test_every_preset_and_script_that_is_named_exists() -> None:
    for document in (README, ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"\b(?:configs|scripts|tests)/[\w./-]+\.(?:toml|py)\b", document.read_text()):
            assert (ROOT / name).is_file(), f"{document.name} names {name}"


def test_every_make_target_that_is_named_exists_and_is_listed_by_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):.*## ", makefile, re.MULTILINE))
    assert set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()) == targets  # type: ignore[index]
    for document in (README, ROOT / "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named <= targets
    assert {"demo", "test", "check"} <= targets


def test_exit_codes_are_those_of_the_errors() -> None:
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README.read_text(), re.MULTILINE))
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.GptqError)
    ]
    assert {str(kind.exit_code) for kind in kinds} | {"0", "130"} == set(table)
    assert table[str(errors.PreflightRefused.exit_code)].startswith("refused by preflight")
    assert table[str(errors.OutOfDeviceMemory.exit_code)].startswith("out of memory")
    assert table[str(errors.UsageError.exit_code)].startswith("usage")
    assert table[str(errors.QualityGateFailed.exit_code)].startswith("a quality gate")
