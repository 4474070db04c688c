"""A lack of memory is exit 4 in every step of every command and of the Python API, and says in which."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gptq_cli
from gptq_cli.calibration import stdlib_text
from gptq_cli.calibration import text as calibration_text
from gptq_cli.checkpoint import verify, writer
from gptq_cli.cli import output
from gptq_cli.engine import block, capture, forwards, mixed
from gptq_cli.engine import run as engine_run
from gptq_cli.errors import OutOfDeviceMemory
from gptq_cli.inference import load as opening
from gptq_cli.jobs import checking, evaluating, fetching, inspecting, loading, quantizing, steps
from gptq_cli.model import model_class, shards, skeleton, source
from tests.e2e.commands import FAST, gptq

FACES: dict[str, Callable[[], BaseException]] = {
    "python": MemoryError,
    "kernel": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "torch": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "thread": lambda: RuntimeError("can't start new thread"),
}
OPENING = "while opening the model"
TEXT = "while reading the calibration text"
BLOCK = "while quantizing block model.layers.0 (1/3) on cpu"
QUANTIZE: dict[str, tuple[Any, str, str]] = {
    "find": (fetching, "find_model", OPENING),
    "headers": (source, "read_header", OPENING),
    "skeleton": (model_class.AutoModelForCausalLM, "from_config", OPENING),
    "trace": (skeleton, "trace", OPENING),
    "facts": (checking, "model_facts", OPENING),
    "tokenizer": (checking, "open_tokenizer", TEXT),
    "text": (calibration_text, "_text_file", TEXT),
    "windows": (checking, "batches_by_source", TEXT),
    "plan": (steps, "resolve", "after reading the calibration text"),
    "reserve": (writer, "reserve", "after reading the calibration text"),
    "load": (engine_run, "open_stream", "while loading the weights"),
    "read": (shards.ShardFiles, "_open", "while loading the weights"),
    "capture": (capture, "_record", "while capturing what enters the blocks"),
    "collect": (block.StageMoments, "add", BLOCK),
    "frame": (forwards.BlockCall, "__call__", "after capturing what enters the blocks"),
    "solve": (mixed, "quantize_linears", BLOCK),
    "pack": (block, "pack", BLOCK),
    "write": (writer.CheckpointWriter, "add_packed", BLOCK),
    "flush": (engine_run, "flush", "after quantizing block model.layers.2"),
    "dense": (writer.CheckpointWriter, "copy_dense", "while writing the tensors that stay dense"),
    "report": (quantizing, "summarize", "after writing the tensors that stay dense"),
    "complete": (writer.CheckpointWriter, "complete", "after writing the tensors that stay dense"),
}
INSPECT: dict[str, tuple[Any, str, str]] = {
    "find": (fetching, "find_model", OPENING),
    "skeleton": (model_class.AutoModelForCausalLM, "from_config", OPENING),
    "plan": (steps, "resolve", "after opening the model"),
    "report": (inspecting, "map_report", "after opening the model"),
    "table": (output, "write_document", "outside of the work"),
}
LOAD: dict[str, tuple[Any, str, str]] = {
    "verify": (verify, "open_checkpoint", "while verifying the files"),
    "open": (loading, "open_checkpoint", OPENING),
    "windows": (loading, "evaluation_windows", OPENING),
    "against": (evaluating, "open_skeleton", OPENING),
    "load": (loading, "load_quantized", "while loading the weights"),
    "pack": (opening, "read_packed", "while loading the weights"),
    "generate": (evaluating, "generate", "while generating text"),
    "bench": (evaluating, "measure_speed", "while measuring speed"),
    "dense": (model_class.AutoModelForCausalLM, "from_pretrained", "while loading the dense model"),
    "evaluate": (evaluating, "compare", "while evaluating"),
}


def with_faces(steps: dict[str, tuple[Any, str, str]]) -> list[tuple[str, str]]:
    """Each step with one face after the other; those whose errors are made into others with all of them."""
    faces = list(FACES)
    pairs = [(step, faces[index % len(faces)]) for index, step in enumerate(steps)]
    return list(
        dict.fromkeys(
            pairs + [(step, face) for step in ("headers", "text", "pack") if step in steps for face in faces]
        )
    )


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "q"
    assert gptq("quantize", tiny_llama, "--out", out, "--calibration", text, *FAST).code == 0
    return out


def fails(monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str, str], face: str) -> None:
    owner, name, _ = place

    def fail(*words: object, **named: object) -> None:
        raise FACES[face]()

    monkeypatch.setattr(owner, name, fail)


def told(words: tuple[object, ...], doing: str) -> None:
    ran = gptq(*words, "--json")
    assert ran.code == 4, ran.stderr
    error = json.loads(ran.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("OutOfDeviceMemory", 4)
    assert error["message"].startswith(f"out of memory {doing}: ")
    assert error["hint"]
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(("step", "face"), with_faces(QUANTIZE))
def test_quantize(
    step: str, face: str, tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    fails(monkeypatch, QUANTIZE[step], face)
    told(
        ("quantize", tiny_llama, "--out", tmp_path / "out" / "q", "--calibration", text, *FAST),
        QUANTIZE[step][2],
    )
    kept = step in ("flush", "dense", "report", "complete")  # after the last block
    assert [path.name for path in (tmp_path / "out").iterdir()] == ([".q.gptq"] if kept else [])


def test_forwards_run_again_where_no_thread_can_be_started(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, (threading.Thread, "start", BLOCK), "thread")
    ran = gptq("quantize", tiny_llama, "--out", tmp_path / "q", "--calibration", text, *FAST)
    assert ran.code == 0
    assert "tried again with forwards that run again for each stage" in ran.stderr


@pytest.mark.parametrize(("step", "face"), with_faces(INSPECT))
def test_inspect_map(step: str, face: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if step == "table":
        monkeypatch.setattr(output, "document", lambda report: (_ for _ in ()).throw(FACES[face]()))
        assert gptq("inspect-map", tiny_llama, "--json").code == 4
        return
    fails(monkeypatch, INSPECT[step], face)
    told(("inspect-map", tiny_llama, "--progress", "none"), INSPECT[step][2])


@pytest.mark.parametrize(("step", "face"), with_faces(LOAD))
def test_load(
    step: str,
    face: str,
    checkpoint: Path,
    tiny_llama: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails(monkeypatch, LOAD[step], face)
    words: tuple[object, ...] = ("--prompt", "a", "--max-new-tokens", "2", "--bench", "--eval", text)
    words = (*words, "--seq-len", "48", "--windows", "2", "--against", tiny_llama, "--progress", "none")
    monkeypatch.setattr(evaluating, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(evaluating, "ROUNDS", 1)
    told(("load", checkpoint, *(("--verify",) if step == "verify" else ()), *words), LOAD[step][2])


def test_a_dry_run_and_the_default_text(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, (stdlib_text, "decode_source", ""), "python")
    words = ("--samples", "512", "--seq-len", "512", "--group-size", "32", "--progress", "none")
    told(("quantize", tiny_llama, "--dry-run", *words), TEXT)


def test_the_python_api(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("open", "load", "pack"):
        with monkeypatch.context() as patch:
            fails(patch, LOAD[step], "kernel")
            with pytest.raises(OutOfDeviceMemory, match=f"^out of memory {LOAD[step][2]}: "):
                gptq_cli.load(str(checkpoint))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_under_a_real_limit(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """4 MiB above what the libraries need: it ends somewhere, with exit 4 and without a traceback."""
    code = """
import json, resource, sys
import torch, transformers, accelerate
from gptq_cli import jobs
from gptq_cli.cli.app import main
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (4 << 20),) * 2)
sys.exit(main(sys.argv[1:]))
"""
    words = ("--calibration", text, "--samples", "64", "--seq-len", "512", "--group-size", "32")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "quantize",
            str(tiny_llama),
            "--out",
            str(tmp_path / "q"),
            *map(str, words),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 4, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "error: out of memory " in done.stderr
    assert not (tmp_path / "q").exists()
