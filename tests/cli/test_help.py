"""The help pages: frozen as text, complete, and quick."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from gptq_cli.cli.app import app
from tests.golden import check_golden

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("quantize", "load", "inspect-map", "push", "report", "doctor", "rules", "targets", "recipes")
DRAWN_BY = "0.29.2"
"""The Typer whose drawing the golden pages hold: another one may draw the same facts otherwise."""


def help_page(*command: str, columns: str = "80") -> str:
    """`gptq … --help` at a width, in a process that knows nothing of this machine."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "HOME") if name in os.environ}
    environ = {
        **kept,
        "COLUMNS": columns,
        "TERM": "dumb",
        "NO_COLOR": "1",
        "PYTHONUTF8": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "gptq_cli", *command, "--help"],
        env=environ,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"


@pytest.mark.skipif(typer.__version__ != DRAWN_BY, reason=f"the pages were drawn by Typer {DRAWN_BY}")
@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=["gptq", *COMMANDS])
def test_the_help_page(command: tuple[str, ...]) -> None:
    page = help_page(*command)
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) <= 80
    assert "<bool>" not in page
    check_golden(f"help/{'-'.join(('gptq', *command))}.txt", page)


@pytest.mark.parametrize("columns", ["0", "5", "no"])
def test_a_help_page_at_no_width_says_as_much(columns: str) -> None:
    def words(page: str) -> set[str]:
        return set(re.findall(r"[\w.-]+", page))

    assert words(help_page("push", columns=columns)) == words(help_page("push"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_one_help_sentence_a_panel_and_a_variable(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    variables = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        assert parameter.help.endswith("."), parameter.name
        assert "[" not in parameter.help, f"{parameter.name}: Rich would take it for markup"
        variables.append(parameter.envvar)
        if parameter.param_type_name == "option":
            assert parameter.rich_help_panel, parameter.name
            flag = parameter.opts[0].removeprefix("--")
            assert parameter.envvar == "GPTQ_" + re.sub("-", "_", flag).upper()
    assert len(set(variables)) == len(variables)


def test_commands_say_what_they_do_in_one_line() -> None:
    group = typer.main.get_command(app)
    expected = COMMANDS
    assert tuple(group.commands) == expected  # type: ignore[attr-defined]
    for command in group.commands.values():  # type: ignore[attr-defined]
        assert command.help.split("\n\n")[0].count("\n") == 0
