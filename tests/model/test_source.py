"""Finding a model: what raises, and what comes back as a list of everything that is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptq_cli.checkpoint.configs import read_formats
from gptq_cli.config import ModelRef
from gptq_cli.errors import CheckpointError, ModelError
from gptq_cli.model.architecture import raw_config
from gptq_cli.model.find import find_model, glance_at_model
from gptq_cli.model.source import INDEX, ModelFiles
from gptq_cli.model.source_files import unsafe_path
from tests.conftest import TinyFactory

HINT = "give a directory with config.json and safetensors files, or a Hub model id (org/name)"


@pytest.fixture
def model(tiny_llama_sharded: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage: three shards with an index."""
    return Path(shutil.copytree(tiny_llama_sharded, tmp_path / "model"))


def problems(path: Path) -> list[tuple[str, str]]:
    return [(p.kind, p.subject) for p in find_model(ModelRef(model=str(path))).problems]


def rewrite_index(model: Path, change: dict[str, str]) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"].update(change)
    (model / INDEX).write_text(json.dumps(index))


def test_a_sound_model(tiny_llama_sharded: Path, tiny_llama: Path) -> None:
    sharded = find_model(ModelRef(model=str(tiny_llama_sharded)))
    single = find_model(ModelRef(model=str(tiny_llama)))
    assert sharded.problems == single.problems == ()
    assert len(sharded.shards) == 3
    assert {t.name: t.shape for t in sharded.tensors} == {t.name: t.shape for t in single.tensors}
    assert sharded.size_bytes == single.size_bytes == 176576 * 4
    assert all((sharded.directory / t.shard).is_file() for t in sharded.tensors)


@pytest.mark.parametrize(
    "missing", ["/no/such/place", "./nothing", "~/nothing-here", "a/b/c", "a b", "../no-such-place", "a\0b"]
)
def test_no_such_directory(missing: str) -> None:
    with pytest.raises(ModelError, match="no such directory") as caught:
        find_model(ModelRef(model=missing))
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("org/name@v1.0", "write org/name --revision v1.0"),
        ("git@example.org:org/name", None),
        ("https://huggingface.co/org/name", "write org/name"),
        ("https://huggingface.co/org/name/", "write org/name"),
        ("https://hf.co/org/name/tree/main", "write org/name --revision main"),
        ("https://example.org/org/name", None),
        ("./nothing@main", None),
        ("@main", None),
    ],
)
def test_a_model_of_the_hub_in_another_spelling(given: str, hint: str | None) -> None:
    with pytest.raises(ModelError, match="no such directory") as caught:
        find_model(ModelRef(model=given))
    assert caught.value.hint == (hint or HINT)


def test_a_hub_id_without_network() -> None:
    with pytest.raises(ModelError, match="Hub cannot be reached") as caught:
        find_model(ModelRef(model="no-such-org/no-such-model"))
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)


def test_a_file_instead_of_a_directory(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        find_model(ModelRef(model=str(tiny_llama / "model.safetensors")))


def test_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_model(ModelRef(model=str(model)))


def test_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter") as caught:
        find_model(ModelRef(model=str(tmp_path)))
    assert "merge" in str(caught.value.hint)


@pytest.mark.parametrize("find", [find_model, glance_at_model])
def test_a_directory_has_no_revisions(find: Callable[[ModelRef], ModelFiles], model: Path) -> None:
    """What stands there would be taken for the revision that was asked for."""
    with pytest.raises(ModelError, match="is a directory, which has no revision v1;") as caught:
        find(ModelRef(model=str(model), revision="v1"))
    assert "leave --revision out" in str(caught.value.hint)
    assert find(ModelRef(model=str(model), revision="")).tensors


def test_truncated_shard(model: Path) -> None:
    shard = model / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert problems(model) == [("truncated-shard", shard.name)]


def test_corrupt_shard(model: Path) -> None:
    shard = model / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[8:20] = b"xxxxxxxxxxxx"
    shard.write_bytes(bytes(content))
    assert problems(model) == [("corrupt-shard", shard.name)]


def denied(path: Path, **_: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_files_that_may_not_be_read_are_not_fetched_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as a user who reads everything, so the refusal is not the file system's."""
    monkeypatch.setattr("gptq_cli.model.source.read_header", denied)
    first = find_model(ModelRef(model=str(model))).problems[0]
    shard = model / "model-00001-of-00003.safetensors"
    assert (first.kind, first.hint) == ("unreadable-shard", f"make it readable: chmod u+r {shard}")
    assert first.message == f"shard {shard.name} cannot be read: permission denied"

    monkeypatch.undo()
    files = find_model(ModelRef(model=str(model)))
    monkeypatch.setattr("gptq_cli.model.architecture.read_json", denied)
    with pytest.raises(ModelError, match=r"config\.json cannot be read: permission denied$") as refused:
        raw_config(files)
    assert refused.value.hint == f"make it readable: chmod u+r {model / 'config.json'}"

    monkeypatch.setattr("gptq_cli.checkpoint.configs.read_json", denied)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: permission denied$") as told:
        read_formats(model)
    assert told.value.hint == f"make it readable: chmod u+r {model / 'config.json'}"


def test_all_problems_come_at_once(model: Path) -> None:
    (model / "model-00001-of-00003.safetensors").unlink()
    (model / "model-00002-of-00003.safetensors").write_bytes(b"")
    shutil.copy(model / "model-00003-of-00003.safetensors", model / "model-00004-of-00004.safetensors")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert sorted(kind for kind, _ in problems(model)) == [
        "missing-shard",
        "no-tokenizer",
        "truncated-shard",
        "unlisted-shard",
    ]


def test_a_shard_that_the_index_forgot(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "model-00003" not in v}
    (model / INDEX).write_text(json.dumps(index))
    assert problems(model) == [("unlisted-shard", "model-00003-of-00003.safetensors")]


def test_a_tensor_that_its_shard_does_not_hold(model: Path) -> None:
    rewrite_index(model, {"model.ghost.weight": "model-00001-of-00003.safetensors"})
    assert problems(model) == [("missing-tensor", "model.ghost.weight")]


def test_tensors_that_the_index_leaves_out(model: Path) -> None:
    """All are read here all the same: it is told once for each shard."""
    index = json.loads((model / INDEX).read_text())
    shard = index["weight_map"]["model.norm.weight"]
    left_out = [name for name, holder in index["weight_map"].items() if holder == shard][1:]
    assert left_out
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in left_out}
    (model / INDEX).write_text(json.dumps(index))
    files = find_model(ModelRef(model=str(model)))
    (problem,) = files.problems
    assert (problem.kind, problem.subject) == ("unlisted-tensor", shard)
    assert left_out[0] in problem.message
    assert set(left_out) <= {tensor.name for tensor in files.tensors}


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd.safetensors", "../outside.safetensors", "a/../../b.safetensors", "C:\\x.safetensors"],
)
def test_a_shard_outside_the_directory(model: Path, path: str) -> None:
    rewrite_index(model, {"lm_head.weight": path})
    kinds = [kind for kind, _ in problems(model)]
    assert "unsafe-path" in kinds
    (found,) = [p for p in find_model(ModelRef(model=str(model))).problems if p.kind == "unsafe-path"]
    assert repr(path) in found.message


@pytest.mark.parametrize(
    ("path", "unsafe"),
    [
        ("a.safetensors", False),
        ("sub/a.safetensors", False),
        ("", True),
        ("a\0", True),
        ("/a", True),
        ("..", True),
    ],
)
def test_unsafe_path(path: str, unsafe: bool) -> None:
    assert unsafe_path(path) is unsafe


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "nope", '{"weight_map": []}']
)
def test_a_bad_index(model: Path, index: str) -> None:
    (model / INDEX).write_text(index)
    assert problems(model) == [("bad-index", INDEX)]


def test_pickles_only(model: Path) -> None:
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    (found,) = find_model(ModelRef(model=str(model))).problems
    assert (found.kind, found.subject) == ("pickled-weights", "pytorch_model.bin")
    assert "save_pretrained" in found.hint


def test_an_index_of_pickles(model: Path) -> None:
    rewrite_index(model, {"lm_head.weight": "pytorch_model.bin"})
    assert ("pickled-weights", INDEX) in problems(model)


def test_gguf_only(model: Path) -> None:
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    (model / "model-q4.gguf").write_bytes(b"GGUF")
    (found,) = find_model(ModelRef(model=str(model))).problems
    assert found.kind == "no-weights"
    assert "GGUF" in found.message


def test_no_weights_at_all(model: Path) -> None:
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    assert [kind for kind, _ in problems(model)] == ["no-weights"]


def test_the_same_tensor_in_two_shards(model: Path, tiny: TinyFactory) -> None:
    shutil.copy(model / "model-00001-of-00003.safetensors", model / "model-00003-of-00003.safetensors")
    found = find_model(ModelRef(model=str(model))).problems
    assert any(p.kind == "corrupt-shard" and "is in model-00001" in p.message for p in found)
