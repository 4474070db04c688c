"""A warning reaches stderr on every display of every command unless --quiet, and every report always."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.engine import loop
from gptq_cli.jobs import quantizing
from tests.e2e.commands import FAST, Ran, gptq

DISPLAYS = ("auto", "rich", "plain", "jsonl", "none")
SMALL = FAST[:-2]
SPILLED = ("--devices", "cuda:0=24GiB,cpu=64GiB", "--device-map", "model.layers.0=cpu,rest=0")
OFFLOAD = "[cpu-offload] device map: CPU offload is not recommended"
LAUNCHED = "[environment] LOCAL_RANK: LOCAL_RANK=0 is set, but one process does all the work"


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "q"
    assert gptq("quantize", tiny_llama, "--out", out, "--calibration", text, *FAST).code == 0
    return out


def flat(text: str) -> str:
    return " ".join(text.replace('\\"', '"').split())


def words_of(warning: str) -> str:
    """The message of a warning without rule and subject, which each display puts where it likes."""
    return warning.rpartition(": ")[2] if warning.startswith("[") else warning


def told_everywhere(ran: Ran, warning: str, *, quiet: bool) -> None:
    """The warning is in the document and, unless `quiet`, on stderr."""
    assert any(found.startswith(warning) for found in ran.document["warnings"]), ran.document["warnings"]
    assert (words_of(warning) in flat(ran.stderr)) is not quiet
    if quiet:
        assert ran.stderr == ""


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("display", DISPLAYS)
def test_plans(display: str, quiet: bool, tiny_llama: Path, text: Path) -> None:
    how = ("--progress", display, *(("--quiet",) if quiet else ()))
    dry = ("quantize", tiny_llama, "--dry-run", "--calibration", text, *SMALL, *SPILLED, *how)
    inspect = ("inspect-map", tiny_llama, "--group-size", "32", "--seq-len", "48", *SPILLED, *how)
    for words in (dry, inspect):
        told_everywhere(gptq(*words, "--json"), OFFLOAD, quiet=quiet)
        table = gptq(*words)
        assert words_of(OFFLOAD) in flat(table.stdout)
        assert (words_of(OFFLOAD) in flat(table.stderr)) is not quiet


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("display", DISPLAYS)
def test_quantize(
    display: str,
    quiet: bool,
    tiny_llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A finding of preflight, a warning of the engine, one of a library, and a page that is not written."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(loop.LeakWatch, "check", lambda self, after: ("memory of xpu:0 grows",))
    run = quantizing.quantize_model

    def warning(*words: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("a library\nhas a word", UserWarning, stacklevel=1)
        return run(*words)

    monkeypatch.setattr(quantizing, "quantize_model", warning)
    how = ("--progress", display, *(("--quiet",) if quiet else ()))
    words = ("quantize", tiny_llama, "--calibration", text, *SMALL, *how)
    ran = gptq(*words, "--out", tmp_path / "q", "--json", "--report", tmp_path / "run.html")
    assert ran.code == 0, ran.stderr
    written = json.loads((tmp_path / "q" / "report.json").read_text())["warnings"]
    html = (tmp_path / "run.html").read_text()
    table = flat(gptq(*words, "--out", tmp_path / "table").stdout) if display == "plain" else ""
    for told in (LAUNCHED, "memory of xpu:0 grows", "UserWarning: a library has a word"):
        told_everywhere(ran, told, quiet=quiet)
        assert told in written
        assert (told.partition(": ")[2] or told) in html  # rule and subject stand in elements of their own
        assert told in table or display != "plain"


def test_a_page_that_cannot_be_written_is_in_the_result(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def full(path: Path, *words: Any, **options: Any) -> int:
        if path.name == "run.html":
            raise OSError(28, "No space left on device")
        return real(path, *words, **options)

    monkeypatch.setattr(Path, "write_text", full)
    words = ("--out", tmp_path / "q", "--calibration", text, *FAST, "--json")
    ran = gptq("quantize", tiny_llama, *words, "--report", tmp_path / "run.html")
    told_everywhere(ran, f"the page {tmp_path / 'run.html'} was not written: no space left", quiet=False)


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("display", DISPLAYS)
def test_load(display: str, quiet: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    how = ("--progress", display, *(("--quiet",) if quiet else ()))
    words = ("load", checkpoint, "--device-map", "cpu", "--verify", "--target", "vllm", "--prompt", "a", *how)
    words = (*words, "--max-new-tokens", "2")
    ran = gptq(*words, "--json")
    told_everywhere(ran, LAUNCHED, quiet=quiet)
    told_everywhere(ran, "[half-precision] vllm: the model's dtype is float32", quiet=quiet)
    assert LAUNCHED in flat(gptq(*words).stdout)


@pytest.mark.parametrize("quiet", [False, True])
def test_load_that_judges_files_alone(quiet: bool, checkpoint: Path) -> None:
    words = ("load", checkpoint, "--target", "vllm", "--progress", "none", *(("--quiet",) if quiet else ()))
    ran = gptq(*words, "--json")
    told_everywhere(ran, "[half-precision] vllm: the model's dtype is float32", quiet=quiet)


def test_load_against_a_dense_model_tells_of_it(
    checkpoint: Path, tiny_llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    words = ("--eval", text, "--seq-len", "48", "--windows", "2", "--against", tiny_llama)
    told_everywhere(gptq("load", checkpoint, *words, "--progress", "none", "--json"), LAUNCHED, quiet=False)
