"""A model of the Hub: its download is shown, in bytes, on every display."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.hub_server import hub_server


def checked(
    environ: dict[str, str], progress: str, text: Path, home: Path
) -> subprocess.CompletedProcess[str]:
    words = ["quantize", "me/model", "--dry-run", "--progress", progress, "--calibration", str(text)]
    words += ["--samples", "4", "--seq-len", "16", "--group-size", "32"]
    return subprocess.run(
        [sys.executable, "-m", "gptq_cli", *words],
        env=os.environ | environ | {"HF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_bytes_as_they_come_and_nothing_from_the_cache(
    tiny_llama_sharded: Path, text: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_llama_sharded.iterdir()}
    size = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    with hub_server() as hub:
        hub.files["me/model"], hub.private["me/model"] = files, False
        came = checked(hub.environ, "jsonl", text, tmp_path)
        again = checked(hub.environ, "plain", text, tmp_path)
    events = [json.loads(line) for line in came.stderr.splitlines()]
    steps = [event for event in events if event["event"] == "PhaseAdvanced" and event["phase"] == "download"]
    assert (steps[-1]["done"], steps[-1]["total"]) == (size, size)
    assert [step["done"] for step in steps] == sorted(step["done"] for step in steps)
    phases = [event["phase"] for event in events if event["event"] == "PhaseFinished"]
    assert phases[phases.index("download") :][:2] == ["download", "open"]
    assert "download: done in" in again.stderr
    assert again.stderr.split("download: done in")[1].splitlines()[0].endswith(", from the cache")
    assert "Fetching" not in came.stderr + again.stderr


def test_a_download_that_breaks_off_goes_on_without_a_word_of_the_library(
    tiny_llama_sharded: Path, text: Path, tmp_path: Path
) -> None:
    with hub_server() as hub:
        hub.files["me/model"] = {path.name: path.read_bytes() for path in tiny_llama_sharded.iterdir()}
        hub.private["me/model"], hub.cut = False, 1
        came = checked(hub.environ, "jsonl", text, tmp_path)
        assert hub.cut == 0
    assert all("event" in json.loads(line) for line in came.stderr.splitlines())
    assert "resume download" not in came.stderr
