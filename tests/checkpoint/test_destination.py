"""The destination: checked when a run begins and right before its end; no file of the user's is ever lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.checkpoint import destination as module
from gptq_cli.checkpoint import place as place_module
from gptq_cli.checkpoint.destination import Destination
from gptq_cli.checkpoint.place import Place, check_destination
from gptq_cli.errors import ConfigError, DestinationBusy, GptqError

CONFIGS = ("config.json", "quantize_config.json")
NEW = dict.fromkeys((*CONFIGS, "model.safetensors"), "new")


def make(path: Path, word: str = "old", **more: str) -> Path:
    """A directory that looks like a checkpoint."""
    path.mkdir(parents=True, exist_ok=True)
    for name, text in (dict.fromkeys((*CONFIGS, "model.safetensors"), word) | more).items():
        (path / name).write_text(text)
    return path


def content(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def left(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def run(out: Path, meanwhile: Callable[[], object] = lambda: None, *, overwrite: bool = False) -> Destination:
    """A complete run: claim, work (and what happens meanwhile), put in place."""
    with Destination(out, overwrite=overwrite) as destination:
        make(destination.result, "new")
        meanwhile()
        destination.put_in_place()
    return destination


@pytest.fixture(params=["exchange", "two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a checkpoint."""
    if request.param == "two steps":
        monkeypatch.setattr(module, "exchange", lambda a, b: False)
    return str(request.param)


@pytest.fixture
def fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that cannot be renamed over, as a mount point: even trying is an error."""
    out = tmp_path / "volume"
    out.mkdir()
    monkeypatch.setattr(place_module, "is_mount", lambda path: path == out)
    rename = os.rename

    def refuse(a: Any, b: Any) -> None:
        if Path(b) == out or Path(a) == out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(a, b)

    monkeypatch.setattr(os, "rename", refuse)
    return out


def test_a_place_that_is_free_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new/parents/q", "empty"):
        run(tmp_path / name)
        assert content(tmp_path / name) == NEW
    assert left(tmp_path) == ["empty", "new"]
    assert left(tmp_path / "new" / "parents") == ["q"]


def test_overwrite(way: str, tmp_path: Path) -> None:
    out = make(tmp_path / "q", "old", notes="mine")
    run(out, overwrite=True)
    assert content(out) == NEW
    assert left(tmp_path) == ["q"]


def write(path: Path, text: str = "precious") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def swap(out: Path, other: Callable[[Path], object]) -> None:
    shutil.rmtree(out)
    other(out)


APPEARED: dict[str, Callable[[Path], object]] = {
    "a directory": lambda out: write(out / "thesis.tex"),
    "a file": write,
    "a link": lambda out: out.symlink_to(make(out.parent / "elsewhere")),
    "a dangling link": lambda out: out.symlink_to("nowhere"),
    "a checkpoint": lambda out: make(out, "another"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", APPEARED)
def test_what_appears_during_the_run_is_left_alone(what: str, overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "q"
    with pytest.raises(GptqError, match="it did not exist, and now") as caught:
        run(out, lambda: APPEARED[what](out), overwrite=overwrite)
    assert os.path.lexists(out)
    assert content(out) != NEW
    if what == "a directory":
        assert (out / "thesis.tex").read_text() == "precious"
        assert "thesis.tex" in caught.value.message
    kept = tmp_path / "q.finished"
    assert content(kept) == NEW
    assert f"mv {kept} {out}" in str(caught.value.hint)
    assert not [name for name in left(tmp_path) if name.startswith(".")]


CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file more": (lambda out: write(out / "sub" / "thesis.tex"), "sub, sub/thesis.tex"),
    "a file less": (lambda out: (out / "model.safetensors").unlink(), "model.safetensors"),
    "a file rewritten": (lambda out: write(out / "model.safetensors"), "model.safetensors"),
    "another checkpoint": (lambda out: swap(out, lambda p: make(p, "another")), ""),
    "another directory": (lambda out: swap(out, lambda p: write(p / "thesis.tex")), ""),
    "a file in its place": (lambda out: swap(out, write), "not a directory"),
    "a link in its place": (lambda out: swap(out, lambda p: p.symlink_to("x")), "not a directory"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_checkpoint_that_changes_during_the_run_is_not_replaced(what: str, tmp_path: Path) -> None:
    out = make(tmp_path / "q")
    change, said = CHANGED[what]
    with pytest.raises(GptqError, match=f"changed during the run, and was not touched: .*{said}"):
        run(out, lambda: change(out), overwrite=True)
    assert content(tmp_path / "q.finished") == NEW
    assert os.path.lexists(out)
    assert content(out) != NEW
    assert left(tmp_path) == ["q", "q.finished"]


@pytest.mark.parametrize("what", ["a file more", "another checkpoint", "another directory"])
def test_a_change_in_the_last_moment(
    what: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the second look and the rename, where nothing but the rename itself can tell."""
    out = make(tmp_path / "q")
    change, _ = CHANGED[what]
    replace = Destination._replace

    def late(destination: Destination) -> None:
        change(out)
        replace(destination)

    monkeypatch.setattr(Destination, "_replace", late)
    with pytest.raises(GptqError, match="not touched"):
        run(out, overwrite=True)
    assert content(tmp_path / "q.finished") == NEW
    assert content(out) != NEW
    if what != "another checkpoint":
        assert "precious" in content(out).values()
    assert left(tmp_path) == ["q", "q.finished"]


def test_a_checkpoint_that_goes_away_during_the_run(tmp_path: Path) -> None:
    out = make(tmp_path / "q")
    run(out, lambda: shutil.rmtree(out), overwrite=True)
    assert content(out) == NEW


def test_results_that_were_kept_before_are_not_replaced(tmp_path: Path) -> None:
    make(tmp_path / "q.finished", "an earlier one")
    with pytest.raises(GptqError) as caught:
        run(tmp_path / "q", lambda: write(tmp_path / "q"))
    assert str(tmp_path / "q.finished-2") in str(caught.value.hint)
    assert content(tmp_path / "q.finished-2") == NEW
    assert "an earlier one" in content(tmp_path / "q.finished").values()


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EIO])
def test_a_rename_that_the_system_refuses(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "q", os.rename

    def refuse(a: Any, b: Any) -> None:
        if Path(b) == out:
            raise OSError(number, os.strerror(number))
        rename(a, b)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(GptqError, match=re.escape(f"{out} cannot be put in place: {os.strerror(number)}")):
        run(out)
    assert content(tmp_path / "q.finished") == NEW
    assert left(tmp_path) == ["q.finished"]


def test_two_steps_put_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "exchange", lambda a, b: False)
    out, rename = make(tmp_path / "q"), os.rename

    def refuse(a: Any, b: Any) -> None:
        if Path(b) == out and Path(a).name == "result":
            raise OSError(errno.EIO, "no")
        rename(a, b)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(GptqError, match="cannot be put in place"):
        run(out, overwrite=True)
    assert set(content(out).values()) == {"old"}
    assert content(tmp_path / "q.finished") == NEW


def test_two_steps_say_where_both_are_when_nothing_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "exchange", lambda a, b: False)
    out, rename, to_free = make(tmp_path / "q"), os.rename, module.rename_to_free

    def refuse(a: Any, b: Any) -> None:
        if Path(b) == out:
            raise OSError(errno.EIO, "no")
        rename(a, b)

    def refuse_back(a: Path, b: Path) -> None:
        if b == out:
            raise OSError(errno.EIO, "nor this")
        to_free(a, b)

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(module, "rename_to_free", refuse_back)
    with pytest.raises(GptqError, match="could not be put back") as caught:
        run(out, overwrite=True)
    assert str(tmp_path / "q.old") in caught.value.message
    assert str(tmp_path / "q.finished") in str(caught.value.hint)
    assert set(content(tmp_path / "q.old").values()) == {"old"}
    assert content(tmp_path / "q.finished") == NEW


KILLED = """
import os, signal, sys
from pathlib import Path
from gptq_cli.checkpoint import destination
from gptq_cli.checkpoint.destination import Destination

out, at, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if way == "fixed":
    from gptq_cli.checkpoint import place
    place.is_mount = lambda path: path == out
if way != "exchange":
    destination.exchange = lambda a, b: False
count = 0

def counted(function):
    def call(*words, **named):
        global count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return function(*words, **named)
    return call

with Destination(out, overwrite=True) as place:
    place.result.mkdir(exist_ok=True)
    for name in ("config.json", "quantize_config.json", "model.safetensors"):
        (place.result / name).write_text("new")
    for name in ("rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    for name in ("exchange", "rename_to_free", "fsync"):
        setattr(destination, name, counted(getattr(destination, name)))
    place.put_in_place()
print("done", count)
"""


def killed(out: Path, at: int, way: str) -> bool:
    """A run that kill -9 ends before its system call number `at`; False where it has no such call."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), str(at), way], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("kind", ["exchange", "two steps"])
def test_kill_9_between_any_two_steps(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "q"
    at = 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        make(out)
        if not killed(out, at, kind):
            break
        if kind == "exchange":
            assert set(content(out).values()) in ({"old"}, {"new"})
        with Destination(out) as destination:
            assert set(content(out).values()) in ({"old"}, {"new"}), at
            told = destination.cleared
        assert left(tmp_path) == ["q"], (at, told)
        at += 1
    assert at > 5
    assert left(tmp_path) == ["q"]


def test_kill_9_while_a_mount_point_is_filled(fixed: Path) -> None:
    at = 0
    while killed(fixed, at, "fixed"):
        complete = all((fixed / name).is_file() for name in CONFIGS)
        with Destination(fixed):
            assert left(fixed) == ([".gptq"] if not complete else [".gptq", *sorted(NEW)])
        assert left(fixed) == (sorted(NEW) if complete else [])
        for name in left(fixed):
            (fixed / name).unlink()
        at += 1
    assert at > 5
    assert content(fixed) == NEW


def test_the_old_one_is_put_back_and_told(tmp_path: Path) -> None:
    out = make(tmp_path / "q")
    assert killed(out, 2, "two steps")
    assert left(tmp_path) == [".q.gptq"]
    assert Place.of(out).standing == tmp_path / ".q.gptq" / "old"
    assert "will be put back" in Place.of(out).left_over(done=False)[0]
    with pytest.raises(ConfigError, match="exists"):
        check_destination(out, None, overwrite=False)
    with Destination(out) as destination:
        assert "was put back" in destination.cleared[0]
    assert set(content(out).values()) == {"old"}


def test_an_old_one_whose_place_was_taken_is_kept(tmp_path: Path) -> None:
    out = make(tmp_path / "q")
    assert killed(out, 2, "two steps")
    write(out / "thesis.tex")
    with Destination(out) as destination:
        assert str(tmp_path / "q.old") in " ".join(destination.cleared)
    assert set(content(tmp_path / "q.old").values()) == {"old"}
    assert content(out) == {"thesis.tex": "precious"}


def test_a_mount_point_is_filled(fixed: Path) -> None:
    (fixed / "lost+found").mkdir()
    order: list[str] = []
    real = module.rename_to_free

    def seen(a: Path, b: Path) -> None:
        order.append(b.name)
        real(a, b)

    identity = os.stat(fixed).st_ino
    module.rename_to_free = seen
    try:
        run(fixed)
    finally:
        module.rename_to_free = real
    assert content(fixed) == NEW
    assert os.stat(fixed).st_ino == identity
    assert order[-2:] == ["quantize_config.json", "config.json"]
    assert left(fixed) == sorted(["lost+found", *NEW])
    assert left(fixed.parent) == ["volume"]


def test_a_mount_point_that_is_no_longer_empty(fixed: Path) -> None:
    with pytest.raises(GptqError, match=r"it was empty, and now holds thesis\.tex"):
        run(fixed, lambda: write(fixed / "thesis.tex"))
    assert content(fixed / "volume.finished") == NEW
    assert left(fixed) == ["thesis.tex", "volume.finished"]


def test_a_mount_point_that_fills_while_it_is_filled(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.rename_to_free

    def late(a: Path, b: Path) -> None:
        if b.name == "model.safetensors" and b.parent == fixed:
            write(fixed / "config.json")
        real(a, b)

    monkeypatch.setattr(module, "rename_to_free", late)
    with pytest.raises(GptqError, match="File exists"):
        run(fixed)
    assert content(fixed / "volume.finished") == NEW
    assert (fixed / "config.json").read_text() == "precious"
    assert left(fixed) == ["config.json", "volume.finished"]


def test_a_mount_point_that_holds_something_is_refused(fixed: Path) -> None:
    make(fixed)
    with pytest.raises(ConfigError, match="exists"):
        check_destination(fixed, None, overwrite=False)
    with pytest.raises(ConfigError, match="cannot be renamed"):
        check_destination(fixed, None, overwrite=True)


@pytest.mark.parametrize("spelled", ["q/", "./q", "link/q", "../{}/q", "link/../{}/q"])
def test_every_spelling_of_a_place_meets_in_one_lock(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(".")
    other = Destination(Path(spelled.format(tmp_path.name)))
    with Destination(tmp_path / "q"), pytest.raises(DestinationBusy), other:
        pass
    os.unlink("link")
    assert left(tmp_path) == []


def test_a_link_to_the_place_meets_in_its_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Destination(tmp_path / "link"), pytest.raises(DestinationBusy), Destination(tmp_path / "real"):
        pass
    run(tmp_path / "link")
    assert content(tmp_path / "real") == NEW
    assert (tmp_path / "link").is_symlink()


def test_a_failed_claim_leaves_no_parents(tmp_path: Path) -> None:
    (tmp_path / ".q.gptq").write_text("mine")
    with pytest.raises(ConfigError), Destination(tmp_path / "q"):
        pass
    with pytest.raises(OSError, match="Not a directory"), Destination(tmp_path / ".q.gptq" / "a" / "b"):
        pass
    assert left(tmp_path) == [".q.gptq"]


def test_folders_of_a_similar_name_stay(tmp_path: Path) -> None:
    for name in (".q.gptq-1234abcd", ".q.gptq-old", "q.gptq", ".q"):
        make(tmp_path / name)
    run(tmp_path / "q")
    assert left(tmp_path) == [".q", ".q.gptq-1234abcd", ".q.gptq-old", "q", "q.gptq"]


def test_an_old_one_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told = make(tmp_path / "q"), []

    def refuse(path: Path) -> None:
        if path.is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with Destination(out, overwrite=True, warn=lambda message, hint: told.append((message, hint))) as place:
        make(place.result, "new")
        monkeypatch.setattr("gptq_cli.checkpoint.working_folder.remove", refuse)
        place.put_in_place()
    assert content(out) == NEW
    assert [hint for _, hint in told] == [f"remove {tmp_path / '.q.gptq'}"]
    monkeypatch.undo()
    with Destination(out) as place:
        assert place.cleared
    assert left(tmp_path) == ["q"]


def kept_work(out: Path, moved: tuple[str, ...] = ()) -> None:
    """A run that ends with a journal, having moved these files of its result to a fixed destination."""
    with Destination(out) as destination:
        make(destination.result, "new")
        destination.journal.mkdir()
        destination.kept = True
        if moved:
            entries = {name: os.lstat(destination.result / name) for name in NEW}
            destination._folder.mark({name: (entry.st_ino, entry.st_size) for name, entry in entries.items()})
        for name in moved:
            os.rename(destination.result / name, out / name)


def test_work_that_is_kept_outlasts_its_run_and_goes_with_the_next(tmp_path: Path) -> None:
    out = tmp_path / "new" / "q"
    kept_work(out)
    assert left(tmp_path / "new") == [".q.gptq"]
    assert Place.of(out).has_work()
    assert Place.of(out).left_over(done=False) == ("", 0)
    with Destination(out) as destination:
        assert destination.kept
        assert content(destination.result) == NEW
        destination.put_in_place()
    assert content(out) == NEW
    assert left(tmp_path / "new") == ["q"]


def test_work_that_is_not_wanted(tmp_path: Path) -> None:
    out = tmp_path / "q"
    kept_work(out)
    with Destination(out) as destination:
        destination.start_over()
        assert left(destination.result) == []
        assert not destination.journal.exists()
    assert left(tmp_path) == []


def test_files_that_were_moved_before_a_kill_go_back_to_the_work(fixed: Path) -> None:
    kept_work(fixed, ("model.safetensors",))
    with Destination(fixed) as destination:
        assert content(destination.result) == NEW
        assert left(fixed) == [".gptq"]
        destination.put_in_place()
    assert content(fixed) == NEW


def test_a_mount_point_that_was_filled_is_no_work(fixed: Path) -> None:
    kept_work(fixed, tuple(NEW))
    assert not Place.of(fixed).has_work()
    with Destination(fixed) as destination:
        assert not destination.kept
    assert content(fixed) == NEW
