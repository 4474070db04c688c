"""What the command line of a rank that follows says, and leaves for the launcher."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from gptq_cli.cli import ranks
from gptq_cli.cli.app import main
from gptq_cli.cli.output import Session
from tests.e2e.commands import Ran, gptq

FIRST = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two; no launcher ends it."""
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 0.0)
    for name, value in (FIRST | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)


def test_an_error_that_the_first_rank_does_not_have_is_said_here(second: None, tmp_path: Path) -> None:
    ran = gptq("quantize", "M", "--out", tmp_path / "q", "--config", tmp_path / "none.toml")
    assert (ran.code, ran.stdout) == (2, "")
    first, *more = ran.stderr.splitlines()
    assert first.startswith("rank 1 on ")
    assert ": error: preset " in first
    assert all(line.startswith("rank 1 on ") for line in more)


@pytest.mark.parametrize(
    ("code", "came", "said"),
    [(1, True, ""), (1, False, "oh"), (2, True, ""), (2, False, "oh"), (130, False, "")],
)
def test_what_the_first_rank_hears_is_not_said_here(
    code: int, came: bool, said: str, second: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)

    def run(session: Session) -> int:
        if came:
            session.come()
        ranks.sys.stderr.write("oh\n")
        return code

    assert ranks.followed(Session(), run) == code
    assert stderr.getvalue().rpartition(": ")[2].strip() == said


def test_processes_that_a_scheduler_started_are_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[Ran] = []
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
        monkeypatch.setenv("SLURM_PROCID", task)
        said.append(gptq("quantize", tmp_path, "--out", tmp_path / "q"))
    assert [ran.code for ran in said] == [2, 2]
    assert "error: SLURM_STEP_NUM_TASKS=2 says" in said[0].stderr
    assert said[1].stderr == ""


def test_torchrun_finds_the_error_where_it_looks_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert main(["quantize", str(tmp_path), "--out", "q", "--bits", "5"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert failure.message["message"] == "bits is 5; allowed: 2, 3, 4, 8"  # type: ignore[index]
    assert failure.timestamp > 0


def test_a_file_for_the_launcher_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranks.tell_launcher({"TORCHELASTIC_ERROR_FILE": str(tmp_path / "none" / "x")}, "oh")
    ranks.tell_launcher({}, "oh")
    assert list(tmp_path.iterdir()) == []
