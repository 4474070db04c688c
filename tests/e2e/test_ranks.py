"""Several processes quantize one model, as torchrun starts them: real processes, gloo, on the CPU.

Processes are expensive, so each pair does several models, one after the other, and tests look at what is
left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptq_cli.cli.app import main
from tests.e2e.commands import write_text
from tests.tiny import save_tiny

KINDS = ("llama", "gpt2", "gemma2", "falcon", "mixtral", "qwen3_moe")
FEW = ("llama", "mixtral")
TEXT = ("--samples", "24", "--seq-len", "48", "--group-size", "32", "--batch-size", "4")
PATIENCE_SECONDS = 240


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@dataclass
class Started:
    """Processes that were started together; each runs the command lines one after the other."""

    lines: list[list[str]]
    size: int
    own_words: dict[int, list[str]] = field(default_factory=dict)
    """Words that a rank is given besides, by rank."""
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ports = [free_port() for _ in self.lines]
        for rank in range(self.size):
            lines = [[*line, *self.own_words.get(rank, [])] for line in self.lines]
            environ = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(self.size),
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            }
            words = [sys.executable, "-m", "tests.e2e.test_ranks", json.dumps([ports, lines])]
            self.processes.append(
                subprocess.Popen(
                    words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )

    def ended(self) -> tuple[list[int], list[str], list[str]]:
        """The exit code, stdout and stderr of every rank."""
        try:
            said = [process.communicate(timeout=PATIENCE_SECONDS) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [p.returncode for p in self.processes], [out for out, _ in said], [err for _, err in said]


def run_lines(text: str) -> int:
    """What each process does: `main` for every command line, until one fails."""
    ports, lines = json.loads(text)
    for port, line in zip(ports, lines, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        code = main(line)
        if code:
            return code
    return 0


def command(folder: Path, kind: str, out: str, *more: str) -> list[str]:
    text = ("--calibration", str(folder / "text.txt"), *TEXT)
    return ["quantize", str(folder / kind), "--out", str(folder / out), *text, *more]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for file in sorted(out.glob("*.safetensors")) for name, value in load_file(file).items()
    }


def losses(out: Path) -> list[float]:
    report: Any = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return [linear["loss"] for block in report["blocks"] for linear in block["linears"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    write_text(made / "text.txt")
    for kind in KINDS:
        save_tiny(kind, made / kind)
    return made


@pytest.fixture(scope="module")
def by_two(folder: Path) -> tuple[list[int], list[str], list[str]]:
    """Every kind by two ranks, one with its head, and at last one that is refused."""
    lines = [command(folder, kind, f"two-{kind}", "--progress", "plain") for kind in KINDS]
    lines.append(command(folder, "llama", "two-head", "--quantize-head", "--progress", "plain"))
    lines.append(command(folder, "llama", "two-llama", "--progress", "plain"))  # it is there: refused
    return Started(lines, 2).ended()


@pytest.fixture(scope="module")
def by_three(folder: Path) -> list[int]:
    """Some kinds by three ranks."""
    return Started([command(folder, kind, f"three-{kind}") for kind in FEW], 3).ended()[0]


@pytest.fixture(scope="module")
def by_one(folder: Path) -> None:
    """Every kind by one process that torchrun started, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
            patch.setenv(name, value)
        for kind in KINDS:
            assert main(command(folder, kind, f"one-{kind}", "--quiet")) == 0
        assert main(command(folder, "llama", "one-head", "--quantize-head", "--quiet")) == 0


@pytest.mark.parametrize("kind", [*KINDS, "head"])
def test_two_ranks_write_what_one_writes(
    kind: str, folder: Path, by_one: None, by_two: tuple[list[int], list[str], list[str]]
) -> None:
    assert by_two[0][0] == 3, by_two[2]
    alone, both = tensors(folder / f"one-{kind}"), tensors(folder / f"two-{kind}")
    assert alone.keys() == both.keys()
    assert [name for name in alone if not torch.equal(alone[name], both[name])] == []
    assert losses(folder / f"two-{kind}") == pytest.approx(losses(folder / f"one-{kind}"), rel=1e-4)


@pytest.mark.parametrize("kind", FEW)
def test_three_ranks_write_what_one_writes(
    kind: str, folder: Path, by_one: None, by_three: list[int]
) -> None:
    assert by_three == [0, 0, 0]
    alone, three = tensors(folder / f"one-{kind}"), tensors(folder / f"three-{kind}")
    assert [name for name in alone if not torch.equal(alone[name], three[name])] == []


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_a_run_without_a_launcher_loses_as_much(kind: str, folder: Path, by_one: None) -> None:
    """It sums in another order, so codes may differ, and losses by half a percent."""
    assert main(command(folder, kind, f"plain-{kind}", "--quiet")) == 0
    plain, leaves = losses(folder / f"plain-{kind}"), losses(folder / f"one-{kind}")
    assert sum(plain) == pytest.approx(sum(leaves), rel=5e-3)


def test_only_the_first_rank_talks(by_two: tuple[list[int], list[str], list[str]]) -> None:
    codes, out, err = by_two
    assert out[0].count(" is ready after ") == len(KINDS) + 1
    assert err[0].count("refused by preflight: 1 error") == 1
    assert (out[1], err[1]) == ("", "")
    assert codes[1] != 0, "a launcher sees that the last one failed"


def test_different_outputs_are_an_error_of_the_first_rank_alone(folder: Path) -> None:
    started = Started([command(folder, "llama", "wrong")], 2, {1: ["--seed", "3"]})
    codes, _, err = started.ended()
    assert 0 not in codes
    assert "was started with '--seed' where rank 0 was with nothing" in err[0]
    assert "all ranks need the same command line" in err[0]
    assert err[1] == ""
    assert not (folder / "wrong").exists()


def test_a_killed_rank_ends_all_and_another_number_of_ranks_goes_on(folder: Path, by_one: None) -> None:
    started = Started([command(folder, "llama", "killed", "--progress", "plain")], 2)
    first, second = started.processes
    assert first.stderr is not None
    deadline = time.monotonic() + PATIENCE_SECONDS
    for line in first.stderr:
        assert time.monotonic() < deadline
        if "block 2/3" in line:
            second.send_signal(signal.SIGKILL)
            break
    codes, _, err = started.ended()
    assert codes == [1, -signal.SIGKILL]
    assert f"error: rank 1 (process {second.pid} on {socket.gethostname()}) ended at model.layers" in err[0]
    assert "are kept in" in err[0]
    assert "to go on: torchrun --nproc-per-node 2 -m gptq_cli quantize" in err[0]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
            patch.setenv(name, value)
        assert main(command(folder, "llama", "killed", "--quiet")) == 0
    report = json.loads((folder / "killed" / "report.json").read_text(encoding="utf-8"))
    assert [start["first_block"] for start in report["starts"]][-1] >= 1
    alone, killed = tensors(folder / "one-llama"), tensors(folder / "killed")
    assert [name for name in alone if not torch.equal(alone[name], killed[name])] == []


if __name__ == "__main__":
    sys.exit(run_lines(sys.argv[1]))
