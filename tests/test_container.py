"""The Dockerfile, as far as it can be checked without a builder: names, versions, order, who runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = {
    "ARG",
    "FROM",
    "WORKDIR",
    "COPY",
    "RUN",
    "SHELL",
    "ENV",
    "USER",
    "VOLUME",
    "ENTRYPOINT",
    "CMD",
}


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest), continued lines joined, comments left out."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined]


def test_every_instruction_is_one() -> None:
    assert {name for name, _ in instructions()} <= INSTRUCTIONS


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    for name, rest in instructions():
        if name == "COPY" and "--from=" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored


def test_stages_that_are_copied_from_exist_and_bases_are_arguments() -> None:
    stages = [rest.split() for name, rest in instructions() if name == "FROM"]
    named = {words[-1] for words in stages if "AS" in words}
    copied = {match for _, rest in instructions() for match in re.findall(r"--from=(\S+)", rest)}
    assert copied == named
    assert stages[-1] == ["${BASE}"]
    given = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    assert set(given) == {"BASE", "TORCH", "TORCH_INDEX"}


def test_versions_are_those_that_passed() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    given = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    assert given["TORCH"] in constraints.splitlines()
    python = re.search(r"python:(\d+\.\d+)", given["BASE"])
    assert python is not None
    assert f"(Python {python[1]})" in constraints.splitlines()[0]
    installs = re.findall(
        r"/pip install [^&]*", " ".join(rest for name, rest in instructions() if name == "RUN")
    )
    assert len(installs) == 2
    assert all("--constraint /opt/constraints.txt" in words for words in installs)


def test_it_runs_gptq_and_not_as_root() -> None:
    last = dict(instructions())
    assert last["ENTRYPOINT"] == '["gptq"]'
    assert last["USER"].isdigit()
    assert last["USER"] != "0"
