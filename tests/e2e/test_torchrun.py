"""The launcher itself: two of its agents on this machine stand for two machines, each with a folder and a
cache of the Hub of its own. Only the first has the model, the text, and the output."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptq_cli.cli.app import main
from tests.e2e.commands import write_text
from tests.e2e.test_ranks import TEXT, different, flat, free_port
from tests.hub_server import hub_server
from tests.tiny import save_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORDS = ("--calibration", "text.txt", *TEXT, "--progress", "plain", "--card", "none")


@dataclass(frozen=True)
class Machine:
    """What one agent and the process that it started left."""

    code: int
    out: str
    err: str


def cached(path: Path, home: Path) -> Path:
    """Have the model of `path` in the cache of the Hub as org/tiny; where it is there."""
    repository = home / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return path.rename(repository / "snapshots" / COMMIT)


def launched(
    folders: list[Path], *words: str, processes: int = 1, more: dict[str, str] | None = None
) -> list[Machine]:
    """One agent in each folder, with so many processes; the first is where they meet. `more`: variables."""
    port, agents = free_port(), []
    for number, folder in enumerate(folders):
        place = [
            "--nnodes",
            str(len(folders)),
            "--node-rank",
            str(number),
            "--nproc-per-node",
            str(processes),
        ]
        place += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        environ = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *place, "-m", "gptq_cli", *words],
                cwd=folder,
                env=os.environ | environ | (more or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    left = [agent.communicate(timeout=240) for agent in agents]
    return [Machine(agent.returncode, *said) for agent, said in zip(agents, left, strict=True)]


def test_what_comes_after_the_work_is_done_by_the_first_process(tmp_path: Path) -> None:
    """Measured, and uploaded; and a dry run of the same launch plans for both."""
    write_text(tmp_path / "text.txt")
    save_tiny("llama", tmp_path / "model")
    words = ("quantize", "model", "--out", "q", *WORDS)
    with hub_server() as hub:
        (ended,) = launched(
            [tmp_path], *words, "--eval", "text.txt", "--push-to-hub", "me/it", processes=2, more=hub.environ
        )
        assert ended.code == 0, ended.err
        assert hub.writes == ["create me/it", "commit me/it"]
        assert "model.safetensors" in hub.files["me/it"]
    assert flat(ended.out).count(" is ready after ") == 1
    assert " perplexity " in ended.out
    assert "me/it is on the Hub" in ended.out
    (planned,) = launched([tmp_path], *words, "--overwrite", "--dry-run", processes=2)
    assert planned.code == 0, planned.err
    assert "ranks 0-1" in planned.out
    assert "LOCAL_RANK" not in planned.out


def test_two_machines_of_which_one_has_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    write_text(folders[0] / "text.txt")
    there = cached(save_tiny("mixtral", tmp_path / "model"), folders[0] / "home")
    first, second = launched(folders, "quantize", "org/tiny", "--out", "q", *WORDS)
    assert (first.code, second.code) == (0, 0), first.err
    assert " is ready after " in flat(first.out)
    assert "does not see org/tiny (no such directory: org/tiny; as a Hub model id it is not in" in first.err
    assert (second.out, [line for line in second.err.splitlines() if "gptq" in line]) == ("", [])
    assert not (folders[1] / "q").exists()

    monkeypatch.chdir(folders[0])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["quantize", str(there), "--out", "one", *WORDS, "--quiet"]) == 0
    assert different(folders[0], "one", "q") == []
