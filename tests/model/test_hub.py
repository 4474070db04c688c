"""Fetching from the Hub, with its client replaced: what is requested, and what errors become."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open

from gptq_cli.config import ModelRef
from gptq_cli.errors import ModelError
from gptq_cli.model import hub
from gptq_cli.model.find import find_model, glance_at_model
from gptq_cli.model.source import INDEX


class FakeHub:
    """Serves one directory; keeps what was asked for."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source = source
        self.snapshot = cache / "models--org--name" / "snapshots" / ("c0ffee" * 6)
        self.asked: list[tuple[list[str], list[str] | None]] = []
        self.revisions: list[str | None] = []

    def snapshot_download(self, repo: str, **kw: Any) -> str:
        self.asked.append((kw["allow_patterns"], kw["ignore_patterns"]))
        self.revisions.append(kw["revision"])
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for path in self.source.iterdir():
            allowed = any(Path(path.name).match(p) for p in kw["allow_patterns"])
            ignored = any(Path(path.name).match(p) for p in kw["ignore_patterns"] or ())
            if path.is_file() and allowed and not ignored:
                shutil.copy(path, self.snapshot / path.name)
        if "tqdm_class" in kw:
            with kw["tqdm_class"](total=10, unit="B", desc="x") as bar:
                bar.update(4)
                bar.update(6)
            kw["tqdm_class"](total=3, unit="it").update(1)
        return str(self.snapshot)

    def get_safetensors_metadata(self, repo: str, **kw: Any) -> Any:
        files = {}
        for path in sorted(self.source.glob("model-*.safetensors")):
            with safe_open(path, framework="np") as file:
                tensors, begin = {}, 0
                for name in file.keys():  # noqa: SIM118
                    shape = file.get_slice(name).get_shape()
                    end = begin + 4 * math.prod(shape)
                    tensors[name] = SimpleNamespace(dtype="F32", shape=shape, data_offsets=(begin, end))
                    begin = end
            files[path.name] = SimpleNamespace(tensors=tensors)
        if not files:
            raise NotASafetensorsRepoError("no safetensors")
        return SimpleNamespace(files_metadata=files)


@pytest.fixture
def fake(tiny_llama_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    source = Path(shutil.copytree(tiny_llama_sharded, tmp_path / "remote"))
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_x.py", "model.gguf"):
        (source / name).write_bytes(b"x")
    fake = FakeHub(source, tmp_path / "cache")
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub, "get_safetensors_metadata", fake.get_safetensors_metadata)
    monkeypatch.setattr(
        hub,
        "HfApi",
        lambda: SimpleNamespace(list_repo_files=lambda *a, **k: [p.name for p in source.iterdir()]),
    )
    return fake


def test_exactly_the_shards_of_the_index(fake: FakeHub) -> None:
    steps: list[tuple[int, int | None]] = []
    files = find_model(ModelRef(model="org/name"), progress=lambda done, total: steps.append((done, total)))
    assert files.revision == "c0ffee" * 6
    assert files.source == "org/name"
    assert files.problems == ()
    assert len(files.shards) == 3
    names = {path.name for path in fake.snapshot.iterdir()}
    assert not names & {"pytorch_model.bin", "consolidated.safetensors", "modeling_x.py", "model.gguf"}
    assert [sorted(allow) for allow, _ in fake.asked][1] == sorted(p.name for p in files.shards)
    tensors = sum(tensor.size_bytes for tensor in files.tensors)  # what the index says, before a byte comes
    assert steps == [(0, tensors), (4, tensors), (10, tensors)]


def test_python_files_only_on_request(fake: FakeHub) -> None:
    find_model(ModelRef(model="org/name", trust_remote_code=True))
    assert (fake.snapshot / "modeling_x.py").is_file()


def test_heads_without_weights(fake: FakeHub, tiny_llama_sharded: Path) -> None:
    files = find_model(ModelRef(model="org/name"), weights=False)
    local = find_model(ModelRef(model=str(tiny_llama_sharded)))
    assert not list(fake.snapshot.glob("*.safetensors"))
    assert files.shards == ()
    assert files.problems == ()
    assert {t.name: (t.shape, t.dtype, t.size_bytes, t.shard) for t in files.tensors} == {
        t.name: (t.shape, t.dtype, t.size_bytes, t.shard) for t in local.tensors
    }


@pytest.mark.parametrize("weights", [True, False])
def test_pickles_only(weights: bool, fake: FakeHub) -> None:
    for path in fake.source.glob("*.safetensors*"):
        path.unlink()
    files = find_model(ModelRef(model="org/name"), weights=weights)
    assert [(p.kind, p.subject) for p in files.problems] == [("pickled-weights", "pytorch_model.bin")]
    assert "--revision" in files.problems[0].hint


def test_a_hostile_index_fetches_nothing_outside(fake: FakeHub) -> None:
    (fake.source / INDEX).write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    files = find_model(ModelRef(model="org/name"))
    assert "unsafe-path" in [p.kind for p in files.problems]
    assert fake.asked[1][0] == ["model.safetensors"]


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def not_in_cache_because(error: Exception) -> LocalEntryNotFoundError:
    """As `huggingface_hub` says of every answer that is an error, where the cache has nothing either."""
    missing = LocalEntryNotFoundError("x")
    missing.__cause__ = error
    return missing


class ConnectTimeout(Exception):  # noqa: N818 - named as the HTTP client names it
    """What the hub's HTTP client raises."""

    __module__ = "httpx2._exceptions"


@pytest.mark.parametrize(
    ("error", "says", "hint"),
    [
        (
            RepositoryNotFoundError("x", response=response(404)),
            "no such model on the Hub: org/name at v1",
            "HF_TOKEN",
        ),
        (GatedRepoError("x", response=response(403)), "gated", "accept its licence"),
        (RevisionNotFoundError("x", response=response(404)), "no revision v1", "leave it out"),
        (LocalEntryNotFoundError("x"), "Hub cannot be reached", "HF_HUB_OFFLINE"),
        (ConnectionError("x"), "Hub cannot be reached", "network"),
        (
            HfHubHTTPError("busy\nsee a page", response=response(503)),
            "the Hub answered for .*: busy$",
            "later",
        ),
        (HfHubHTTPError("bad token", response=response(401)), "the Hub answered .*: bad token$", "HF_TOKEN"),
        (ConnectTimeout("slow"), "cannot be fetched: slow", "network"),
        (
            not_in_cache_because(HfHubHTTPError("forbidden", response=response(403))),
            "the Hub answered for .*: forbidden$",
            "set HF_TOKEN",
        ),
        (
            not_in_cache_because(HfHubHTTPError("busy", response=response(503))),
            "the Hub answered for .*: busy$",
            "later",
        ),
        (not_in_cache_because(ConnectTimeout("slow")), "Hub cannot be reached", "network"),
        (
            OSError("Consistency check failed: 1.\nRetry."),
            "broke off: Consistency check failed: 1.$",
            "again",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/c/x"), "no space left on device: /c/x$", "room"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/c"),
            "cache: permission denied: /c$",
            "HF_HUB_CACHE",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", constants.HF_TOKEN_PATH),
            "the Hub's token cannot be read: permission denied: ",
            "HF_TOKEN",
        ),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "not an answer of the Hub", "HF_ENDPOINT"),
    ],
)
def test_errors(
    error: Exception, says: str, hint: str, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=says) as caught:
        find_model(ModelRef(model="org/name", revision="v1"))
    assert hint in (caught.value.hint or "")


def test_without_a_revision_main_is_named(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RevisionNotFoundError("x", response=response(404))

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"has no revision main$"):
        find_model(ModelRef(model="org/name"))


def test_a_download_that_broke_off_is_not_a_model_that_is_not_there(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectTimeout("slow")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"the download of org/name broke off: slow$") as caught:
        find_model(ModelRef(model="org/name"))
    assert "run the same command again" in (caught.value.hint or "")


def test_a_broken_shard_in_the_cache_is_fetched_again_by_what_the_hint_says(fake: FakeHub) -> None:
    """Run again, the command would find it in the cache."""
    shard = min(fake.source.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (problem,) = find_model(ModelRef(model="org/name")).problems
    assert problem.kind == "truncated-shard"
    command = f"hf download org/name {shard.name} --force-download --revision {fake.snapshot.name}"
    assert problem.hint == command


def test_a_defect_is_not_dressed_up(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find_model(ModelRef(model="org/name"))


def test_the_weights_are_of_the_commit_that_the_small_files_were_of(fake: FakeHub) -> None:
    files = find_model(ModelRef(model="org/name", revision="main"))
    assert fake.revisions == ["main", fake.snapshot.name]
    assert files.revision == fake.snapshot.name


@pytest.fixture
def offline(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds a whole model, and a client without a network."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("c0ffee" * 6 + "c0ff")
    shutil.copytree(tiny_llama, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize(
    ("gone", "lacks"),
    [
        (["config.json"], "config.json$"),
        (["config.json", "model.safetensors"], "config.json, model.safetensors$"),
        (["*"], "config.json, model.safetensors, the files of the tokenizer$"),
    ],
)
def test_offline_a_part_of_a_model_in_the_cache_is_told(gone: list[str], lacks: str, offline: Path) -> None:
    """As a download leaves it that broke off."""
    assert find_model(ModelRef(model="org/name")).problems == ()
    for path in [path for name in gone for path in offline.glob(name)]:
        path.unlink()
    if gone == ["*"]:
        offline.rmdir()
    said = f"only a part of org/name is in the cache, .*; there is no {lacks}"
    with pytest.raises(ModelError, match=said) as caught:
        find_model(ModelRef(model="org/name"))
    assert "unset HF_HUB_OFFLINE: the rest is fetched" in (caught.value.hint or "")
    with pytest.raises(ModelError, match="it is not in the cache"):
        find_model(ModelRef(model="org/name", revision="v1"))


def test_offline_weights_that_are_not_in_the_cache_are_told(offline: Path) -> None:
    (offline / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only a part of org/name .*; there is no model\.safetensors$"):
        find_model(ModelRef(model="org/name"), weights=False)
    (problem,) = find_model(ModelRef(model="org/name")).problems
    assert problem.kind == "no-weights"
    assert problem.hint.startswith("only a part of org/name is in the cache: connect to the network")


def test_offline_an_adapter_in_the_cache_is_called_one(offline: Path) -> None:
    (offline / "config.json").rename(offline / "adapter_config.json")
    with pytest.raises(ModelError, match="org/name is an adapter, not a model"):
        glance_at_model(ModelRef(model="org/name"))
