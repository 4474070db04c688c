"""Files of a stranger's directory: regular, inside, unchanged."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from gptq_cli.checkpoint.side_files import copy_sidecars
from gptq_cli.config import ModelRef
from gptq_cli.errors import ModelError, SourceChanged
from gptq_cli.model.find import find_model
from gptq_cli.model.source import scan_directory
from gptq_cli.model.source_files import (
    NotRegularError,
    check_unchanged,
    is_copied,
    open_regular,
    outside_target,
    small_files,
    special_kind,
    stamps_of,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "inner.json").write_text("{}")
    (tmp_path / "secret").write_text("not for upload")
    (tmp_path / "model-b").mkdir()
    (tmp_path / "model-b" / "config.json").write_text("[]")
    return folder


def cache(tmp_path: Path) -> tuple[Path, Path]:
    """A snapshot of a hub cache, and its repository."""
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "e1").write_text("{}")
    return snapshot, repository


@pytest.mark.parametrize(
    "to", ["config.json", "sub/inner.json", "sub/../config.json", "../model/config.json"]
)
def test_a_link_that_stays_inside(to: str, model: Path) -> None:
    (model / "x").symlink_to(to)
    (model / "chain").symlink_to("x")
    assert outside_target(model, "x") is None
    assert outside_target(model, "chain") is None


@pytest.mark.parametrize("to", ["../secret", "sub/../../secret", "../model-b/config.json", "/etc/hostname"])
def test_a_link_that_leads_out(to: str, model: Path) -> None:
    (model / "x").symlink_to(to)
    (model / "chain").symlink_to("x")
    real = os.path.realpath(model / to)
    assert outside_target(model, "x") == real
    assert outside_target(model, "chain") == real


def test_a_folder_that_is_a_link(model: Path) -> None:
    (model / "additional_chat_templates").symlink_to("../model-b", target_is_directory=True)
    (model / "inside").symlink_to("sub", target_is_directory=True)
    assert outside_target(model, "additional_chat_templates/config.json") is not None
    assert outside_target(model, "inside/inner.json") is None


def test_the_directory_itself_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(model)
    (model / "x").symlink_to(model / "config.json")
    assert outside_target(tmp_path / "alias", "config.json") is None
    assert outside_target(tmp_path / "alias", "x") is None


def test_a_loop_and_a_broken_link_are_not_followed(model: Path) -> None:
    (model / "a").symlink_to("b")
    (model / "b").symlink_to("a")
    (model / "tokenizer_gone").symlink_to("nothing")
    assert stamps_of(model, ("a", "b", "tokenizer_gone")) == ()
    assert special_kind(model / "a") is None


def test_a_hub_cache(tmp_path: Path) -> None:
    snapshot, repository = cache(tmp_path)
    (snapshot / "config.json").symlink_to("../../blobs/e1")
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "x.json").symlink_to("../../../blobs/e1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    (snapshot / "tokenizer_ref").symlink_to("../../refs/main")
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "e2").write_text("x")
    (snapshot / "tokenizer_other").symlink_to("../../../models--org--other/blobs/e2")
    assert outside_target(snapshot, "config.json") is None
    assert outside_target(snapshot / "sub", "x.json") is None
    assert outside_target(snapshot, "tokenizer_ref") is not None
    assert outside_target(snapshot, "tokenizer_other") is not None


def test_blobs_that_are_a_link_themselves(tmp_path: Path) -> None:
    snapshot, repository = cache(tmp_path)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("not for upload")
    (repository / "blobs" / "e1").unlink()
    (repository / "blobs").rmdir()
    (repository / "blobs").symlink_to(tmp_path / "private")
    (snapshot / "tokenizer_x").symlink_to("../../blobs/key")
    assert outside_target(snapshot, "tokenizer_x") == str(tmp_path / "private" / "key")


def test_what_is_no_file_is_never_opened(model: Path) -> None:
    os.mkfifo(model / "pipe")
    (model / "link").symlink_to("pipe")
    (model / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(model / "socket"))
        kinds = {"pipe": "a named pipe", "link": "a named pipe", "zero": "a device", "socket": "a socket"}
        for name, kind in kinds.items():
            assert special_kind(model / name) == kind
            with pytest.raises(NotRegularError, match=kind):
                open_regular(model / name)
        assert stamps_of(model, kinds) == ()
    assert special_kind(model / "config.json") is None
    with open_regular(model / "config.json") as file:
        assert file.read() == b"{}"


def test_which_files_are_looked_at(model: Path) -> None:
    for name in ("tokenizer.json", "code.py", "README.md", "LICENSE"):
        (model / name).write_text("x")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "a.jinja").write_text("x")
    (model / "tokenizer_folder").mkdir()
    found = list(small_files(model))
    assert found == [
        "LICENSE",
        "code.py",
        "config.json",
        "tokenizer.json",
        "additional_chat_templates/a.jinja",
    ]
    assert [name for name in found if is_copied(name, code=False)] == [found[0], *found[3:]]
    assert is_copied("code.py")
    assert not is_copied("sub/model-00001-of-00002.safetensors")


LARGE = 3 << 20


@pytest.fixture
def weights(model: Path) -> Path:
    (model / "model.safetensors").write_bytes(bytes(range(256)) * (LARGE // 256))
    return model / "model.safetensors"


def keep_times(path: Path, before: os.stat_result) -> None:
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def changed(model: Path, name: str, how: str) -> None:
    """Do to a file what people and programs do."""
    path = model / name
    before, data = path.stat(), path.read_bytes()
    other = bytes(255 - byte for byte in data)
    if how == "rewritten":
        path.write_bytes(other)
    elif how == "rewritten, time put back":
        path.write_bytes(other)
        keep_times(path, before)
    elif how == "replaced":
        (model / "new").write_bytes(other)
        os.replace(model / "new", path)
    elif how == "replaced, time put back":
        (model / "new").write_bytes(other)
        keep_times(model / "new", before)
        os.replace(model / "new", path)
    elif how == "longer":
        path.write_bytes(data + b" ")
    elif how == "truncated":
        os.truncate(path, len(data) // 2)
    elif how == "deleted":
        path.unlink()
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "another link":
        (model / "target").write_bytes(other)
        path.unlink()
        path.symlink_to("target")


HOW = [
    "rewritten", "rewritten, time put back", "replaced", "replaced, time put back", "longer", "truncated",
    "deleted", "a pipe", "another link",
]  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_change_is_named(name: str, how: str, model: Path, weights: Path) -> None:
    stamps = stamps_of(model, ("config.json", "model.safetensors"))
    check_unchanged(model, stamps)
    changed(model, name, how)
    with pytest.raises(SourceChanged, match=name) as caught:
        check_unchanged(model, stamps)
    assert "nothing was written" in str(caught.value.hint)
    assert caught.value.exit_code == 1


def test_what_leaves_the_content_alone_is_no_change(model: Path, weights: Path) -> None:
    """A touch of a small file; a hard link, another mode, a copy with its time put back, for weights too."""
    stamps = stamps_of(model, ("config.json", "model.safetensors"))
    os.utime(model / "config.json", ns=(1, 1))
    os.link(weights, model / "hard")
    weights.chmod(0o400)
    check_unchanged(model, stamps)
    (model / "new").write_bytes(weights.read_bytes())
    keep_times(model / "new", weights.stat())
    os.replace(model / "new", weights)
    check_unchanged(model, stamps)
    os.utime(weights, ns=(1, 1))  # weights are not read twice: a touch counts as a change
    with pytest.raises(SourceChanged, match="modification time"):
        check_unchanged(model, stamps)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("pointer", [True, False])
def test_a_file_that_was_not_fetched_is_named(
    tiny_llama: Path, tmp_path: Path, name: str, pointer: bool
) -> None:
    """A pointer of Git LFS, and a link to nothing: one problem each, which says what to do."""
    path = tmp_path / "model"
    shutil.copytree(tiny_llama, path)
    if name.endswith("index.json"):
        (path / "model.safetensors").unlink()
    (path / name).unlink(missing_ok=True)
    if pointer:
        (path / name).write_text(POINTER)
        words, hint = f"{name} is a pointer of Git LFS, not the file itself", "lfs pull"
    else:
        (path / name).symlink_to("nowhere")
        words, hint = f"{name} is a link to nowhere, which is not there", "put the file there"
    if name == "config.json":
        with pytest.raises(ModelError, match=words.partition(" ")[2]) as caught:
            find_model(ModelRef(model=str(path)))
        assert hint in str(caught.value.hint)
        return
    (problem,) = [p for p in scan_directory(path).problems if p.kind != "no-tokenizer"]
    assert (problem.kind, problem.subject, problem.message) == ("file-not-fetched", name, words)
    assert hint in problem.hint


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LICENSE", "pointer-left-out"),
        ("NOTICE.txt", "pointer-left-out"),
        ("chat_template.jinja", "file-not-fetched"),
        ("additional_chat_templates/tool.jinja", "file-not-fetched"),
        ("generation_config.json", "file-not-fetched"),
        ("preprocessor_config.json", "file-not-fetched"),
    ],
)
def test_a_pointer_in_the_place_of_a_file_that_is_copied_is_told(
    tiny_llama: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """One that would be read is an error; one for people is left out of the checkpoint."""
    path, copy = tmp_path / "model", tmp_path / "copy"
    shutil.copytree(tiny_llama, path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(POINTER)
    files = scan_directory(path)
    (problem,) = files.problems
    assert (problem.kind, problem.subject) == (kind, name)
    assert problem.message.startswith(f"{name} is a pointer of Git LFS, not the file itself")
    assert problem.message.endswith("left out of the checkpoint") == (kind == "pointer-left-out")
    assert "lfs pull" in problem.hint
    copy.mkdir()
    assert name not in copy_sidecars(files, copy, code=True)


def test_a_folder_of_templates_that_is_a_link_to_nothing_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_llama, path)
    (path / "additional_chat_templates").symlink_to("nowhere")
    (problem,) = scan_directory(path).problems
    assert (problem.kind, problem.subject) == ("link-left-out", "additional_chat_templates")
    assert "is a link to nowhere, which is not there: it is left out" in problem.message


@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja", "additional_chat_templates/tool.jinja"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_link_to_nothing_in_the_place_of_a_file_that_is_copied_is_told(
    tiny_llama: Path, tmp_path: Path, name: str, inside: bool
) -> None:
    """The model opens without it; that the checkpoint will lack it is said."""
    path = tmp_path / "model"
    shutil.copytree(tiny_llama, path)
    (path / name).parent.mkdir(exist_ok=True)
    target = "nowhere" if inside else str(tmp_path / "blobs" / "gone")
    (path / name).symlink_to(target)
    (problem,) = scan_directory(path).problems
    assert (problem.kind, problem.subject) == ("link-left-out", name)
    said = f"{name} is a link to {target}, which is not there: it is left out of the checkpoint"
    assert problem.message == said
