"""Uploads to a Hub on loopback: nothing that was not verified, all at once, resumed, refused early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import FAST, Ran, gptq
from tests.hub_server import Hub, hub_server

NO_HOME = str(Path(tempfile.gettempdir()) / "no-such-folder-of-the-hub")
"""Where no token is kept."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "q"
    assert gptq("quantize", tiny_llama, "--out", out, "--calibration", text, *FAST).code == 0
    return out


def client(hub: Hub, *words: object, **environ: str) -> Ran:
    """`gptq words…` in a process of its own: the address of the Hub is read when its client is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "gptq_cli", *map(str, words)],
        env={**os.environ, **hub.environ, "HF_HOME": NO_HOME, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_a_finished_checkpoint_is_uploaded_in_one_commit(hub: Hub, checkpoint: Path) -> None:
    page = checkpoint / "run.html"
    page.write_text("<!doctype html>")
    done = client(hub, "push", checkpoint, "me/model", "--private", "--json")
    page.unlink()  # it names this machine, as report.json does
    assert done.code == 0, done.stderr
    assert done.document["url"].endswith("/commit/" + "d" * 40)
    assert hub.writes == ["create me/model", "commit me/model"]
    assert hub.private["me/model"]
    here = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "report.json"}
    there = dict(hub.files["me/model"])
    card = there.pop("README.md").decode()
    assert "vllm serve DIR\n" in here["README.md"].decode()
    assert card == here.pop("README.md").decode().replace("vllm serve DIR", "vllm serve me/model").replace(
        "--model-path DIR", "--model-path me/model"
    ).replace("from_pretrained('DIR'", "from_pretrained('me/model'")
    assert there == here


def test_an_upload_that_failed_sends_no_weight_twice(hub: Hub, checkpoint: Path) -> None:
    hub.fail_commit = True
    failed = client(hub, "push", checkpoint, "me/model")
    assert failed.code == 1
    said = " ".join(failed.stderr.split())
    assert "the disk of the Hub is full" in said
    assert f"gptq push {checkpoint} me/model" in said
    assert hub.files["me/model"] == {}
    hub.fail_commit = False
    assert client(hub, "push", checkpoint, "me/model").code == 0
    assert len(hub.sent) == 1
    assert "model.safetensors" in hub.files["me/model"]


def test_weights_of_an_earlier_checkpoint_do_not_stay(hub: Hub, checkpoint: Path) -> None:
    hub.files["me/model"] = {
        "model-00001-of-00002.safetensors": b"x",
        "quantize_config.json": b"{}",
        "a": b"",
    }
    hub.private["me/model"] = False
    assert client(hub, "push", checkpoint, "me/model").code == 0
    assert {"a", "model.safetensors"} <= hub.files["me/model"].keys()
    assert "model-00001-of-00002.safetensors" not in hub.files["me/model"]


def test_what_is_not_sound_is_not_uploaded(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[:-64] if path.suffix == ".safetensors" else content)
    done = client(hub, "push", broken, "me/model")
    assert done.code == 5
    assert "was not uploaded" in done.stderr
    assert hub.writes == []


def test_quantize_uploads_its_result_after_its_gates(
    hub: Hub, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    words = ("--calibration", text, *FAST, "--push-to-hub", "team/q", "--eval", text, "--json")
    failed = client(hub, "quantize", tiny_llama, "--out", tmp_path / "a", *words, "--max-perplexity", "1")
    assert failed.code == 5
    assert hub.writes == []
    done = client(hub, "quantize", tiny_llama, "--out", tmp_path / "b", *words)
    assert done.code == 0, done.stderr
    assert done.document["pushed"]["repo_id"] == "team/q"
    card = hub.files["team/q"]["README.md"].decode()
    assert "vllm serve team/q" in card
    assert "| perplexity |" in card
    assert "report.json" not in hub.files["team/q"]


@pytest.mark.slow  # a process for each
@pytest.mark.parametrize(
    ("repo", "environ", "held", "rule"),
    [
        ("me/model", {"HF_HUB_OFFLINE": "1"}, None, "push-offline"),
        ("me/model", {"HF_TOKEN": ""}, None, "push-token"),
        ("me/model", {"HF_TOKEN": "hf_wrong"}, None, "push-unreachable"),
        ("me/model", {"HF_TOKEN": "hf_read"}, None, "push-read-only"),
        ("model", {}, None, "push-id"),
        ("me/a b", {}, None, "push-id"),
        ("other/model", {}, None, "push-namespace"),
        ("me/model", {}, {"README.md": b""}, "push-visibility"),
        ("me/model", {}, {"model.safetensors": b"", "config.json": b"{}"}, "push-other-model"),
    ],
)
def test_what_forbids_an_upload_is_found_before_the_work(
    repo: str,
    environ: dict[str, str],
    held: dict[str, bytes] | None,
    rule: str,
    hub: Hub,
    checkpoint: Path,
) -> None:
    if held is not None:
        hub.files[repo], hub.private[repo] = held, rule != "push-visibility"
    done = client(hub, "push", checkpoint, repo, "--private", "--json", **environ)
    assert done.code == 3, done.stderr
    assert [item["rule"] for item in json.loads(done.stdout)["error"]["findings"]] == [rule]
    assert hub.writes == []


def test_quantize_refuses_before_the_work(hub: Hub, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    words = ("--calibration", text, *FAST, "--push-to-hub", "me/model")
    done = client(hub, "quantize", tiny_llama, "--out", out, *words, HF_HUB_OFFLINE="1")
    assert done.code == 3
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert not out.exists()
