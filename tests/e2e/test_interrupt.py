"""An interruption in the middle of a block: exit 130, and nothing that looks like a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import write_text


def hear_signals() -> None:
    """Signals as a terminal leaves them: a shell starts what runs in the background with SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_block(number: signal.Signals, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    text = write_text(tmp_path / "text.txt", words=40_000)
    words = [
        "quantize",
        tiny_llama,
        "--out",
        tmp_path / "out" / "q",
        "--calibration",
        text,
        "--group-size",
        "32",
    ]
    words += ["--samples", "200", "--seq-len", "256", "--batch-size", "1", "--progress", "jsonl"]
    command = [sys.executable, "-m", "gptq_cli", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=hear_signals
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if json.loads(line)["event"] == "LinearQuantized":
                process.send_signal(number)
                break
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert list((tmp_path / "out").iterdir()) == []
