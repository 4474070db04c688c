"""The working folder: one holder at a time, recognised by what we wrote into it, gone when the run ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from gptq_cli.checkpoint.working_folder import (
    WorkingFolder,
    is_held,
    is_ours,
    is_taken,
    marker_problem,
    read_owner,
    stem,
    why_taken,
)
from gptq_cli.errors import ConfigError, DestinationBusy

HOLD = """
import sys
from pathlib import Path
from gptq_cli.checkpoint.working_folder import WorkingFolder
folder = WorkingFolder(Path(sys.argv[1]), Path(sys.argv[1]).parent / "q")
folder.claim(); folder.mark(); print("held", flush=True); sys.stdin.read()
"""


def folder_of(tmp_path: Path) -> WorkingFolder:
    return WorkingFolder(tmp_path / ".q.gptq", tmp_path / "q")


def test_claim_and_release_leave_nothing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert folder.claim() is None
    folder.mark()
    assert is_ours(folder.path)
    assert is_held(folder.path)
    folder.clear()
    folder.release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_is_named_and_kill_9_frees_the_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DestinationBusy, match=rf"process {other.pid} on \S+, started 20\d\d-") as caught:
            folder.claim()
        assert f"kill {other.pid}" in str(caught.value.hint)
        assert is_held(folder.path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert not is_held(folder.path)
    before = folder.claim()
    assert before is not None
    assert before.pid == other.pid
    folder.release()
    assert list(tmp_path.iterdir()) == []


def test_two_claims_in_one_process_do_not_share(tmp_path: Path) -> None:
    first, second = folder_of(tmp_path), folder_of(tmp_path)
    first.claim()
    with pytest.raises(DestinationBusy):
        second.claim()
    first.release()
    second.claim()
    second.release()


def test_a_lock_whose_file_was_removed_is_not_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before us removes file and folder as its last act; whoever opened the file in that moment
    starts over."""
    folder = folder_of(tmp_path)
    real, tries = FileLock.acquire, []

    def acquire(lock: Any, *words: Any, **named: Any) -> Any:
        got = real(lock, *words, **named)
        if not tries:
            os.unlink(lock.lock_file)
            os.rmdir(folder.path)
        tries.append(lock.lock_file)
        return got

    monkeypatch.setattr(FileLock, "acquire", acquire)
    folder.claim()
    assert len(tries) == 2
    with pytest.raises(DestinationBusy):
        folder_of(tmp_path).claim()
    folder.release()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"run.json": "{}"},
        {"run.json": '{"tool": "other"}'},
        {"run.json": "[" * 100_000},
        {"run.json": '{"tool": "gptq-cli", "pid": "x"}'},
    ],
)
def test_a_strangers_folder_is_never_touched(content: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / ".q.gptq"
    (path / "result").mkdir(parents=True)
    (path / "result" / "thesis.tex").write_text("x")
    for name, text in content.items():
        (path / name).write_text(text)
    assert is_taken(path)
    assert not is_ours(path)
    with pytest.raises(ConfigError, match=r"\.q\.gptq is in the way"):
        folder_of(tmp_path).claim()
    assert (path / "result" / "thesis.tex").is_file()


def test_links_and_files_are_strangers(tmp_path: Path) -> None:
    ours = WorkingFolder(tmp_path / "ours", tmp_path / "q")
    ours.claim()
    ours.mark()
    (tmp_path / "link").symlink_to(ours.path)
    (tmp_path / "file").write_text("x")
    assert is_taken(tmp_path / "link")
    assert is_taken(tmp_path / "file")
    assert not is_taken(tmp_path / "nowhere")
    ours.release()


def test_what_a_person_puts_into_our_folder_stays(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.claim()
    folder.mark()
    folder.result.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    folder.clear()
    folder.release()
    assert os.listdir(folder.path) == ["notes.txt"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(lock: Any, *words: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", none)
    folder = folder_of(tmp_path)
    folder.claim()
    folder.mark()
    assert folder.unlocked == f"this file system has no locks ({os.strerror(number)})"
    assert is_held(folder.path)
    with pytest.raises(DestinationBusy, match="no locks") as caught:
        folder_of(tmp_path).claim()
    assert f"remove {folder.path / 'lock.soft'}" in caught.value.message
    marker = folder.path / "run.json"
    marker.write_text(marker.read_text().replace(f'"pid": {os.getpid()}', '"pid": 99999999'))
    assert not is_held(folder.path)  # as after kill -9
    folder.release()
    assert list(tmp_path.iterdir()) == []


def test_names_fit_the_file_system_and_stay_apart() -> None:
    assert stem("q") == "q"
    long = ["ü" * 120 + end for end in "ab"]
    assert len({stem(name) for name in long}) == 2
    assert all(len(os.fsencode(stem(name))) <= 120 for name in long)


def test_the_marker_says_who_works_here(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.claim()
    folder.mark({"config.json": (7, 11)})
    owner = read_owner(folder.path)
    assert owner is not None
    assert owner.is_this_process
    assert owner.placing == {"config.json": (7, 11)}
    assert json.loads((folder.path / "run.json").read_text())["out"] == str(tmp_path / "q")
    folder.release()


MARKERS = ("run.json", "run-copy.json")


@pytest.mark.parametrize("text", ["", "{", "\0" * 300, None], ids=["empty", "cut", "zeros", "gone"])
@pytest.mark.parametrize("name", MARKERS)
def test_one_damaged_marker_is_no_loss(name: str, text: str | None, tmp_path: Path) -> None:
    """Each of the two says all that is to be known, and a problem with the first is told."""
    folder = folder_of(tmp_path)
    folder.claim()
    folder.mark({"config.json": (7, 11)}, moving=3)
    owner = read_owner(folder.path)
    assert marker_problem(folder.path) == ""
    (folder.path / name).unlink()
    if text is not None:
        (folder.path / name).write_text(text)
    assert read_owner(folder.path) == owner
    assert is_ours(folder.path)
    what = "gone" if text is None else "damaged"
    said = f"{folder.path / name} is {what}; its copy is used" if name == MARKERS[0] else ""
    assert marker_problem(folder.path) == said
    folder.mark()
    assert [(folder.path / one).read_text() for one in MARKERS][1:] == [
        (folder.path / MARKERS[0]).read_text()
    ]
    folder.clear()
    folder.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_left_to_the_user_has_no_marker(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.claim()
    folder.mark()
    folder.result.mkdir()
    folder.unmark()
    folder.let_go()
    assert not is_ours(folder.path)


@pytest.mark.parametrize("name", [*MARKERS, "journal/manifest.json"])
def test_damaged_markers_are_not_said_to_be_of_no_run(name: str, tmp_path: Path) -> None:
    """Nothing in the folder is touched, but the words are true."""
    folder = tmp_path / ".q.gptq"
    (folder / "journal").mkdir(parents=True)
    assert why_taken(folder) == "no run made it"
    (folder / name).write_text("{")
    assert is_taken(folder)
    assert why_taken(folder).startswith("neither its run.json nor the copy of it can be read")
    with pytest.raises(ConfigError, match="can be read"):
        WorkingFolder(folder, tmp_path / "q").claim()
