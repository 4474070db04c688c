"""README says what the program does: its commands, its exit codes, its files, its output.

`make golden` writes the samples that are equal everywhere. Those that hold times and measured sizes are
written by scripts/readme_samples.py, and their rows are compared with a run on a tiny model.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gptq_cli import errors
from gptq_cli.cli.app import app
from gptq_cli.cli.preset import shipped_presets
from tests.e2e.commands import gptq, write_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
SAMPLED = ("demo/SmolLM2-135M-Instruct", "demo/SmolLM2-135M-Instruct-w4g64", "Llama-3.1-8B")
"""What the samples' commands are run on."""
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _console_lines(prefix: str) -> Iterator[list[str]]:
    """Words of every `$ prefix …` line in the documents and the presets' comments."""
    pattern = re.compile(rf"^(?:\$|#)\s+({prefix} .*)$", re.MULTILINE)
    for path in (*DOCUMENTS, *sorted((ROOT / "configs").glob("*.toml"))):
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
        assert own[0] in ("MODEL", "DIR") or own[0] in SAMPLED, words


def test_every_preset_and_script_that_is_named_exists() -> None:
    (listed,) = re.findall(r"# a preset: (.*), or a file", README.read_text(encoding="utf-8"))
    assert listed.split(", ") == list(shipped_presets())
    for document in DOCUMENTS:
        for name in re.findall(r"\b(?:scripts|tests)/[\w./-]+\.(?:toml|py|sh)\b", document.read_text()):
            assert (ROOT / name).is_file(), f"{document.name} names {name}"


def test_every_link_to_a_file_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_make_target_that_is_named_exists_and_is_listed_by_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):.*## ", makefile, re.MULTILINE))
    assert set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()) == targets  # type: ignore[index]
    for document in DOCUMENTS:
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


def _module(name: str) -> Any:
    """scripts/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def samples() -> Any:
    """scripts/readme_samples.py."""
    return _module("readme_samples")


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the model of the samples that no weight is read for."""
    return tmp_path_factory.mktemp("hollow")


@pytest.fixture(scope="module")
def shown(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What quantize and load print for a tiny model, with the options that README's samples have."""
    folder = tmp_path_factory.mktemp("shown")
    text, out = write_text(folder / "text.txt"), folder / "tiny"
    fast = ("--samples", "8", "--seq-len", "48", "--progress", "none")
    made = gptq("quantize", tiny_llama, "--out", out, "--group-size", "64", "--calibration", text, *fast)
    assert made.code == 0, made.stderr
    words = ("--prompt", "one two", "--raw", "--max-new-tokens", "4", "--eval", text, "--windows", "2")
    with chdir(folder):  # a long path would wrap the first row
        read = gptq("load", out.name, *words, "--seq-len", "48", "--progress", "none")
    assert read.code == 0, read.stderr
    return {"quantize": made.stdout, "load": read.stdout}


@pytest.mark.parametrize("name", ["map", "memory"])
def test_samples_that_are_equal_everywhere(samples: Any, hollow: Path, name: str) -> None:
    text, block = README.read_text(encoding="utf-8"), samples.EXACT[name](hollow)
    if os.environ.get("UPDATE_GOLDEN"):
        README.write_text(samples.replaced(text, name, block), encoding="utf-8")
        return
    assert samples.sample_of(text, name) == block, "if this is meant: make golden"


def test_the_summary_of_a_run_has_the_rows_that_readme_shows(samples: Any, shown: dict[str, str]) -> None:
    sample = samples.sample_of(README.read_text(encoding="utf-8"), "quantize")
    assert samples.structure(sample) == samples.structure(shown["quantize"].split("\n worst linears")[0])


def test_the_summary_of_a_load_has_the_rows_that_readme_shows(samples: Any, shown: dict[str, str]) -> None:
    sample = samples.sample_of(README.read_text(encoding="utf-8"), "load")
    rows, made = samples.structure(sample), samples.structure(shown["load"])
    start = "PATH is loaded,"  # before it stands the text
    assert rows[rows.index(start) :] == made[made.index(start) :]
    assert rows.index(start) == made.index(start) == 1


def test_a_row_that_drifts_is_seen(samples: Any, shown: dict[str, str]) -> None:
    drifted = shown["quantize"].replace(" peak memory ", " highest memory ")
    assert samples.structure(drifted) != samples.structure(shown["quantize"])
    assert len(samples.structure(shown["quantize"])) > 8


def test_the_table_of_the_demo_has_the_rows_that_readme_shows(
    samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    made = _module("demo").comparison("w4g64", (2e8, 1e8), (1.0, 2.0, 1.5), "pydoc-heldout", 32, 512)
    sample = samples.sample_of(README.read_text(encoding="utf-8"), "demo")
    assert samples.structure(sample) == samples.structure(made)
    assert len(samples.structure(made)) == 4


def test_the_time_estimates_have_the_rows_that_are_probed(samples: Any) -> None:
    sample = samples.sample_of(README.read_text(encoding="utf-8"), "time")
    rows = re.findall(r"^\| (\w+) \| 128 x (\d+) \| about [\d. hminsd]+ \|$", sample, re.MULTILINE)
    assert [(recipe, int(seq_len)) for recipe, seq_len in rows] == list(samples.TIMED)


def test_the_samples_of_a_demo_are_taken_out_of_its_output(samples: Any, shown: dict[str, str]) -> None:
    command = "$ gptq quantize M --out D --overwrite --bits 4"
    table = "perplexity on t, 1 windows of 2 tokens\n\n  dense   1 MB\n\nprompt: x"
    found = samples.samples_of_demo(f"\n{command}\n{shown['quantize']}\n$ gptq load D\n{table}\n")
    assert found["quantize"].startswith("```console\n$ gptq quantize M --out D --bits 4\n ")
    assert "worst linears" not in found["quantize"]
    assert samples.structure(found["quantize"]) == samples.structure(shown["quantize"].split("\n worst")[0])
    assert found["demo"].splitlines()[1] == "perplexity on t, 1 windows of 2 tokens"
    text = samples.replaced("a\n<!-- sample x: begin -->\nold\n<!-- sample x: end -->\nb", "x", "new")
    assert (samples.sample_of(text, "x"), text[:2], text[-2:]) == ("new", "a\n", "\nb")
