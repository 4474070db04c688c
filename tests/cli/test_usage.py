"""Usage errors in our own words, near names, variables that nothing reads, values for the tab key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from gptq_cli.cli import completion
from gptq_cli.cli.app import app
from gptq_cli.cli.environment import known_variables, unread_variables
from gptq_cli.cli.usage import near_options
from gptq_cli.preflight.registry import RULES
from tests.cli.conftest import FakeJobs, Run

QUANTIZE = ("quantize", "M", "--out", "O")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("--samples", "many"), "--samples is 'many'; allowed: a whole number", "gptq quantize --help"),
        (("--samples", "1.5"), "--samples is '1.5'; allowed: a whole number", "gptq quantize --help"),
        (("--dense-share", "half"), "--dense-share is 'half'; allowed: a number", "gptq quantize --help"),
        (
            ("--recipe", "balancd"),
            "--recipe is 'balancd'; allowed: fast, balanced, best",
            "did you mean balanced?",
        ),
        (
            ("--dtype", "x"),
            "--dtype is 'x'; allowed: auto, float16, bfloat16, float32",
            "gptq quantize --help",
        ),
        (
            ("--samples", "9" * 5000),
            "allowed: a whole number of fewer than 4300 digits",
            "gptq quantize --help",
        ),
        (("--target", "vlm"), "target is 'vlm'; allowed: vllm, ", "did you mean vllm?"),
        (("--resume", "nevr"), "--resume is 'nevr'; allowed: auto, never, required", "did you mean never?"),
        (("--config", "w4g12"), "preset 'w4g12' is not found", "did you mean --config w4g128?"),
        (("--nope",), "no such option: --nope\n", "hint: gptq quantize --help\n"),
        (("--no-refi",), "no such option: --no-refi\n", "did you mean --no-refit?"),
        (("--bitz", "4"), "no such option: --bitz\n", "did you mean --bits?"),
    ],
)
def test_usage_errors_name_value_and_choice(
    jobs: FakeJobs, run: Run, words: tuple[str, ...], message: str, hint: str
) -> None:
    outcome = run(*QUANTIZE, *words)
    assert (outcome.code, jobs.called) == (2, "")
    assert message in outcome.err
    assert hint in outcome.err
    assert "Input should" not in outcome.err
    assert "Value error" not in outcome.err
    assert len(outcome.err) < 600


def test_near_options() -> None:
    options = ("--dtype", "--no-refit", "--refit", "--tp", "--device-map")
    assert near_options("--nope", options) == []
    assert near_options("--devce-map", options) == ["--device-map"]


@pytest.mark.parametrize("progress", ["none", "plain", "jsonl", "rich"])
def test_a_misspelt_variable_is_a_warning(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch, progress: str
) -> None:
    monkeypatch.setenv("GPTQ_BITZ", "4")
    monkeypatch.setenv("GPTQ_WINDOWS", "3")  # of another command
    outcome = run(*QUANTIZE, "--progress", progress)
    assert (outcome.code, jobs.called) == (0, "quantize")
    assert "GPTQ_BITZ" in outcome.err
    assert "GPTQ_BITS" in outcome.err
    assert "GPTQ_WINDOWS" not in outcome.err
    assert run(*QUANTIZE, "--quiet").err == ""


def test_every_option_has_a_known_variable() -> None:
    command = typer.main.get_command(app)
    known = known_variables(command)
    assert {"GPTQ_GROUP_SIZE", "GPTQ_MODEL", "GPTQ_KERNEL", "GPTQ_EXPLAIN"} <= known
    assert list(unread_variables(command, dict.fromkeys(known, "1") | {"PATH": ""})) == []
    (warned,) = unread_variables(command, {"GPTQ_XYZZY": "1"})
    assert "GPTQ_XYZZY" in warned.message


def test_a_rule_is_explained_as_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gptq_cli", "inspect-map", "--explain", "memory-budget", "--json"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    document = json.loads(done.stdout)
    assert document["id"] == "memory-budget"
    assert document["explanation"] == RULES["memory-budget"].explanation


def test_a_flag_has_no_type_on_the_help_page(run: Run) -> None:
    (line,) = [line for line in run("--help").out.splitlines() if "--version" in line]
    assert "bool" not in line


def completed(words: str) -> list[str]:
    """What bash is offered after `words`, whose last one may be begun."""
    place = len(words.split(" ")) - 1
    done = subprocess.run(
        [sys.executable, "-c", "from gptq_cli.cli.app import app; app(prog_name='gptq')"],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "_GPTQ_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(place),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("gptq load x --target v", ["vllm"]),
        ("gptq quantize x --target s", ["sglang"]),
        ("gptq quantize x --bits ", ["2", "3", "4", "8"]),
        ("gptq quantize x --recipe b", ["balanced", "best"]),
        ("gptq inspect-map --explain memory-b", ["memory-budget"]),
        ("gptq quantize x --config w4g1", ["w4g128"]),
        ("gptq quantize x --device-map b", ["balanced", "balanced_low_0"]),
        ("gptq load x --device-map cp", ["cpu"]),
        ("gptq quantize x --group-size a", ["auto"]),
        ("gptq load x --eval pydoc-", ["pydoc-heldout"]),
    ],
)
def test_values_are_completed(words: str, offered: list[str]) -> None:
    assert completed(words) == offered


def test_cards_are_offered_as_the_file_system_shows_them(tmp_path: Path) -> None:
    for name in ("nvidia1", "nvidia0", "nvidiactl", "null"):
        (tmp_path / name).touch()
    assert completion._devices(tmp_path)[:3] == ["cpu", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (
            ("quantise", "m"),
            "no such command: quantise; available: quantize, load",
            "did you mean gptq quantize?",
        ),
        (("frobnicate",), "no such command: frobnicate", "gptq --help"),
        (("quantize", "m", "--bits"), "--bits needs a value", "gptq quantize --help"),
        (("rules", "--json=3"), "--json takes no value", "gptq rules --help"),
        (("--nope",), "no such option: --nope", "gptq --help"),
    ],
)
def test_words_that_are_not_understood(words: tuple[str, ...], said: str, hint: str, run: Run) -> None:
    outcome = run(*words)
    assert outcome.code == 2
    first, second = outcome.err.splitlines()
    assert first.startswith(f"error: {said}")
    assert second == f"  hint: {hint}"
