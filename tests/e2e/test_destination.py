"""What stands at --out, before, while and after a run, through the real command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.checkpoint import destination
from gptq_cli.checkpoint.destination import Destination
from gptq_cli.jobs import fetching, quantizing
from tests.e2e.commands import FAST, Ran, gptq


@pytest.fixture(scope="module")
def made(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the model, to be copied."""
    out = tmp_path_factory.mktemp("made") / "q"
    assert quantized(tiny_llama, out, text).code == 0
    return out


def quantized(model: Path, out: Path, text: Path, *more: str, interrupted: bool = False) -> Ran:
    words = ("quantize", model, "--out", out, "--calibration", text, "--recipe", "fast", *FAST, *more)
    return gptq(*words, interrupted=interrupted)


def while_it_works(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something when the weights are quantized and the result is not yet in place."""
    real = quantizing.quantize_model

    def quantize_model(*words: Any) -> Any:
        action()
        return real(*words)

    monkeypatch.setattr(quantizing, "quantize_model", quantize_model)


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_files_that_appear_are_left_alone_and_the_result_is_kept(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q"

    def appear() -> None:
        out.mkdir()
        (out / "thesis.tex").write_text("precious")

    while_it_works(monkeypatch, appear)
    ran = quantized(tiny_llama, out, text)
    assert ran.code == 1
    assert "now holds thesis.tex" in ran.stderr
    assert f"hint: the finished checkpoint is {tmp_path / 'q.finished'}" in ran.stderr
    assert (out / "thesis.tex").read_text() == "precious"
    assert gptq("load", tmp_path / "q.finished", "--quiet").code == 0
    assert names(tmp_path) == ["q", "q.finished"]


def test_a_second_run_is_refused_at_once_and_names_the_first(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    read: list[str] = []
    with Destination(tmp_path / "q"):
        monkeypatch.setattr(fetching, "find_model", lambda _, **__: read.append("the model"))
        ran = quantized(tiny_llama, tmp_path / "link" / "q", text, "--json")
    assert (ran.code, read) == (3, [])
    (finding,) = ran.document["error"]["findings"]
    assert finding["rule"] == "output-busy"
    assert f"process {os.getpid()} on " in finding["message"]
    assert names(tmp_path) == ["link"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_last_rename_comes_too_late(
    number: signal.Signals,
    tiny_llama: Path,
    text: Path,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, real = Path(shutil.copytree(made, tmp_path / "q")), destination.exchange
    before = os.stat(out).st_ino

    def exchange(a: Path, b: Path) -> bool:
        os.kill(os.getpid(), number)
        return real(a, b)

    monkeypatch.setattr(destination, "exchange", exchange)
    ran = quantized(tiny_llama, out, text, "--overwrite", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["out"] == str(out)
    assert os.stat(out).st_ino != before
    assert names(tmp_path) == ["q"]


def test_a_signal_before_the_last_rename_interrupts(
    tiny_llama: Path, text: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(made, tmp_path / "q"))
    before = os.stat(out).st_ino
    while_it_works(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert quantized(tiny_llama, out, text, "--overwrite", interrupted=True).code == 130
    assert os.stat(out).st_ino == before
    assert names(tmp_path) == ["q"]


KILLED = """
import os, signal, sys
from gptq_cli.jobs import checking, quantizing
from gptq_cli.cli.app import main
quantizing.quantize_model = lambda *words: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def test_what_kill_9_leaves_is_found_told_and_removed(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    words = ["quantize", str(tiny_llama), "--out", str(out), "--calibration", str(text), *FAST]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".q.gptq"]
    planned = quantized(tiny_llama, out, text, "--dry-run", "--json")
    assert planned.code == 0
    (finding,) = [f for f in planned.document["findings"] if f["rule"] == "output-leftovers"]
    assert finding["message"].startswith(
        f"the run will remove {tmp_path / '.q.gptq'}, left by a run that ended"
    )
    ran = gptq(*words, "--progress", "plain")
    assert ran.code == 0
    assert f"removed {tmp_path / '.q.gptq'}, left by a run that ended" in ran.stderr
    assert names(tmp_path) == ["q"]


def test_leftovers_are_removed_by_a_run_that_is_refused_as_well(
    tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    words = ["quantize", str(tiny_llama), "--out", str(out), "--calibration", str(text), *FAST]
    subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    ran = gptq(*words, "--progress", "plain")
    assert ran.code == 3
    assert "output-exists" in ran.stderr
    assert f"removed {tmp_path / '.q.gptq'}" in ran.stderr
    assert names(tmp_path) == ["q"]


def test_an_empty_mount_point(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    out = tmp_path / "volume"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", out], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this container may not mount")
    try:
        assert quantized(tiny_llama, out, text, "--dry-run").code == 0
        ran = quantized(tiny_llama, out, text)
        assert ran.code == 0, ran.stderr
        assert "config.json" in names(out)
        assert not [name for name in names(out) if name.startswith(".")]
        refused = quantized(tiny_llama, out, text, "--overwrite", "--json")
        assert refused.code == 3
        (finding,) = refused.document["error"]["findings"][:1]
        assert finding["rule"] == "output-exists"
        assert f"--out {out / 'gptq'}" in finding["hint"]
    finally:
        subprocess.run(["umount", out], check=True)
    assert names(tmp_path) == ["volume"]


@pytest.mark.parametrize("dry", [True, False])
def test_what_the_start_can_know(
    dry: bool, tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A licence that cannot be read, a name that is not UTF-8, a parent that cannot be written."""
    source = tmp_path / "model"
    source.mkdir()
    for path in tiny_llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "LICENSE").write_text("free")
    parent = tmp_path / "theirs"
    parent.mkdir()
    opened, access = os.open, os.access

    def refuse(path: Any, *words: Any, **named: Any) -> int:
        if os.fspath(path).endswith("LICENSE"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return opened(path, *words, **named)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, *a, **k: Path(path) != parent and access(path, *a, **k))
    out = parent / os.fsdecode(b"q\xff")
    more = ("--dry-run", "--json") if dry else ("--json",)
    ran = quantized(source, out, text, *more)
    assert ran.code == 3
    findings = ran.document["findings"] if dry else ran.document["error"]["findings"]
    said = {finding["rule"]: finding for finding in findings}
    assert {"unreadable-file", "output-name-not-text", "output-unwritable"} <= said.keys()
    assert said["unreadable-file"]["message"].startswith("LICENSE would be copied")
    assert names(parent) == []


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_the_page_of_a_run_may_be_in_its_result(
    there: bool, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    """Which does not exist before the end. It is no part of an upload, and no fault of the checkpoint."""
    out = tmp_path / "new" / "q"
    if there:
        out.mkdir(parents=True)
    ran = quantized(tiny_llama, out, text, "--report", str(out / "run.html"))
    assert ran.code == 0, ran.stderr
    assert "warning" not in ran.stderr
    assert (out / "run.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "report.json" in names(out)
    again = quantized(tiny_llama, out, text, "--overwrite", "--report", str(out / "run.html"))
    assert again.code == 0, again.stderr
    assert "run.html" in names(out)


def test_a_command_line_that_is_not_utf8_is_reported(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"t\xe9xt.txt")
    odd.write_bytes(text.read_bytes())
    ran = quantized(tiny_llama, tmp_path / "q", odd, "--report", str(tmp_path / "run.html"))
    assert ran.code == 0, ran.stderr
    assert str(odd) in json.loads((tmp_path / "q" / "report.json").read_text())["command_line"]
    assert (tmp_path / "run.html").is_file()
