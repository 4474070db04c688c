"""Every wrong request: the exit code, what the message names, and that nothing was written."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, gptq, write_text


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    write_text(tmp_path / "text.txt")
    return tmp_path


def refused(place: Path, model: object, *words: object, code: int, says: str) -> None:
    """`quantize` must end with `code`, say `says`, hint at a way out, and leave `place/out` empty."""
    if "--calibration" not in words:
        words = ("--calibration", place / "text.txt", *words)
    ran = gptq("quantize", model, "--out", place / "out" / "q", *FAST, *words)
    assert ran.code == code, ran.stderr
    assert says in " ".join(ran.stderr.split()), ran.stderr
    assert "Traceback" not in ran.stderr
    assert list((place / "out").iterdir()) == []


FLAGS = [
    (("--bits", "5"), 2, "bits is 5"),
    (("--group-size", "0"), 2, "group_size is 0"),
    (("--group-size", "48"), 3, "48"),
    (("--group-size", "100"), 3, "100"),
    (("--group-size", "4096"), 3, "4096"),
    (("--damp-percent", "1.5"), 2, "damp_percent is 1.5"),
    (("--device-map", "gpu!!"), 2, "gpu!!"),
    (("--device-map", "cuda:-1"), 2, "-1"),
    (("--device-map", "cuda:7"), 3, "cuda:7"),
    (("--device-map", "model.layerz=cpu,rest=cpu"), 3, "model.layerz"),
    (("--device-map", "[1, 2]"), 2, "[1, 2]"),
    (("--device-map", "disk"), 3, "disk offload is not supported with GPTQ quantization"),
    (("--max-memory", "cpu=lots"), 2, "lots"),
    (("--samples", "100000"), 3, "100000"),
    (("--calibration", "no-such-file.txt"), 3, "no-such-file.txt"),
    (("--max-shard-size", "huge"), 2, "huge"),
    (
        ("--seed", "99999999999999999999"),
        2,
        "seed is 99999999999999999999; allowed: a whole number from 0 to",
    ),
    (("--report", "/"), 2, "which is a directory"),
    (("--report", "no/such/folder/run.html"), 2, "cannot be written"),
]


@pytest.mark.parametrize(("words", "code", "says"), FLAGS, ids=[" ".join(words) for words, _, _ in FLAGS])
def test_a_wrong_flag(words: tuple[str, ...], code: int, says: str, tiny_llama: Path, place: Path) -> None:
    refused(place, tiny_llama, *words, code=code, says=says)


def test_no_such_directory(place: Path) -> None:
    refused(place, place / "nowhere", code=2, says="nowhere")


def test_a_hub_id_without_network(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(place, "nobody/no-such-model-anywhere", code=2, says="nobody/no-such-model-anywhere")


def edited(model: Path, place: Path) -> Path:
    copy = place / "model"
    shutil.copytree(model, copy)
    return copy


def test_a_model_that_is_no_causal_lm(tiny_llama: Path, place: Path) -> None:
    model = edited(tiny_llama, place)
    (model / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    refused(place, model, code=2, says="BertModel")


def test_an_already_quantized_model(tiny_llama: Path, place: Path) -> None:
    model = edited(tiny_llama, place)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "quantization_mode": "online"}
    (model / "config.json").write_text(json.dumps(config))
    refused(place, model, code=3, says="bitnet")


def test_pickled_weights_only(tiny_llama: Path, place: Path) -> None:
    model = edited(tiny_llama, place)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(place, model, code=3, says="pytorch_model.bin")


def test_a_truncated_shard(tiny_llama: Path, place: Path) -> None:
    model = edited(tiny_llama, place)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(place, model, code=3, says="model.safetensors")


def test_a_corrupt_shard(tiny_llama: Path, place: Path) -> None:
    model = edited(tiny_llama, place)
    data = bytearray((model / "model.safetensors").read_bytes())
    data[8:40] = b"\xff" * 32
    (model / "model.safetensors").write_bytes(data)
    refused(place, model, code=3, says="model.safetensors")


def test_a_shard_missing_from_the_index(tiny_llama_sharded: Path, place: Path) -> None:
    model = edited(tiny_llama_sharded, place)
    lost = sorted(model.glob("model-*.safetensors"))[1]
    lost.unlink()
    refused(place, model, code=3, says=lost.name)


def test_a_missing_tokenizer(tiny_llama: Path, place: Path) -> None:
    model = edited(tiny_llama, place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    refused(place, model, code=3, says="tokenizer")


def test_a_text_shorter_than_one_window(tiny_llama: Path, place: Path) -> None:
    (place / "short.txt").write_text("too short")
    refused(place, tiny_llama, "--calibration", place / "short.txt", code=3, says="short.txt")


def test_stdin_closed(tiny_llama: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    refused(place, tiny_llama, "--calibration", "-", code=3, says="standard input")


def test_stdin_empty(tiny_llama: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    refused(place, tiny_llama, "--calibration", "-", code=3, says="standard input")


@pytest.mark.parametrize(
    ("toml", "says"),
    [("bitz = 4", "did you mean"), ('bits = "four"', "bits"), ("bits = [4]", "bits"), ("= 4", "preset.toml")],
)
def test_a_wrong_preset(toml: str, says: str, tiny_llama: Path, place: Path) -> None:
    (place / "preset.toml").write_text(toml)
    refused(place, tiny_llama, "--config", place / "preset.toml", code=2, says=says)


def test_out_equal_to_the_model(tiny_llama: Path, place: Path) -> None:
    model = edited(tiny_llama, place)
    before = sorted(path.name for path in model.iterdir())
    ran = gptq("quantize", model, "--out", model, "--calibration", place / "text.txt", *FAST, "--overwrite")
    assert ran.code == 3
    assert "model" in ran.stderr
    assert sorted(path.name for path in model.iterdir()) == before


def test_a_directory_of_something_else_is_never_replaced(tiny_llama: Path, place: Path) -> None:
    mine = place / "out" / "q"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    words = ("--out", mine, "--calibration", place / "text.txt", *FAST, "--overwrite")
    for more in ((), ("--dry-run",)):
        ran = gptq("quantize", tiny_llama, *words, *more)
        assert ran.code == 3
        assert "--overwrite does not touch" in " ".join((ran.stdout + ran.stderr).split())
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_an_empty_directory_and_a_link_to_a_checkpoint_are_fine(tiny_llama: Path, place: Path) -> None:
    real = place / "out" / "q"
    real.mkdir()
    words = ("quantize", tiny_llama, "--calibration", place / "text.txt", *FAST)
    assert gptq(*words, "--out", real).code == 0
    before = (real / "model.safetensors").read_bytes()
    link = place / "link"
    link.symlink_to(real)
    assert gptq(*words, "--out", link, "--bits", "8", "--overwrite").code == 0
    assert link.is_symlink()
    assert (real / "model.safetensors").read_bytes() != before
    assert [path.name for path in (place / "out").iterdir()] == ["q"]


def test_a_name_that_the_file_system_cannot_hold(tiny_llama: Path, place: Path) -> None:
    words = ("quantize", tiny_llama, "--calibration", place / "text.txt", *FAST)
    long = gptq(*words, "--out", place / "out" / ("q" * 300))
    assert long.code == 3
    assert "300 bytes" in long.stderr
    assert list((place / "out").iterdir()) == []
    assert gptq(*words, "--out", place / "out" / ("q" * 250)).code == 0


def test_a_usage_error_is_json_where_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_JSON", "1")
    ran = gptq("quantize", "model", "--frobnicate")
    assert ran.code == 2
    assert ran.document["error"]["exit_code"] == 2


def test_a_closed_stdout_is_no_defect(tiny_llama: Path, place: Path) -> None:
    words = ["quantize", str(tiny_llama), "--out", str(place / "out" / "q"), "--dry-run", "--json", *FAST]
    words += ["--calibration", str(place / "text.txt")]
    command = "import sys; sys.stdout = None; from gptq_cli.cli.app import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run([sys.executable, "-c", command, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr


def test_all_findings_come_at_once(tiny_llama: Path, place: Path) -> None:
    (place / "short.txt").write_text("too short")
    words = ("--calibration", place / "short.txt", "--group-size", "48", "--device-map", "disk", "--json")
    ran = gptq("quantize", tiny_llama, "--out", place / "out" / "q", *FAST, *words)
    assert ran.code == 3
    rules = {finding["rule"] for finding in ran.document["error"]["findings"] if finding["level"] == "error"}
    assert len(rules) >= 3


@pytest.mark.parametrize("damage", ["config", "shard", "tensor"])
def test_load_names_what_is_wrong(damage: str, tiny: TinyFactory, place: Path) -> None:
    out = place / "out" / "q"
    words = ("quantize", tiny("llama"), "--out", out, "--calibration", place / "text.txt", *FAST)
    assert gptq(*words).code == 0
    if damage == "config":
        (out / "quantize_config.json").write_text("{")
        says = "quantize_config.json"
    elif damage == "shard":
        data = (out / "model.safetensors").read_bytes()
        (out / "model.safetensors").write_bytes(data[:-100])
        says = "model.safetensors"
    else:
        from safetensors.torch import load_file, save_file

        says = "model.layers.0.mlp.up_proj.scales"
        tensors = load_file(out / "model.safetensors")
        del tensors[says]
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ran = gptq("load", out, "--progress", "none")
    assert ran.code == 2
    assert says in ran.stderr


CLOSED = """
import sys
from pathlib import Path
from tests.e2e.commands import gptq
place = Path(sys.argv[1])
CALIBRATED = ("quantize", place / "model", "--out", place / "q", "--calibration")
for words in (
    ("inspect-map", place / "closed"),
    ("inspect-map", place / "closed" / "model"),
    ("load", place / "closed"),
    ("load", place / "closed" / "q"),
    ("quantize", "M", "--out", "O", "--config", place / "closed" / "preset.toml"),
    ("quantize", "M", "--out", "O", "--report", place / "closed" / "run.html"),
    (*CALIBRATED, place / "closed" / "text.txt", *sys.argv[2:]),
    (*CALIBRATED, place / "closed.txt", *sys.argv[2:]),
):
    ran = gptq(*words)
    said = " ".join(f"{ran.stdout} {ran.stderr}".split())
    assert ran.code in (2, 3), (words, said)
    assert "ermission denied" in said, (words, said)
    assert "Traceback" not in said, (words, said)
    assert not (place / "q").exists()
print("all refused")
"""


def obey_permissions() -> None:
    """Before the child starts: root without the capabilities that open every directory."""
    if os.getuid() == 0:
        libc = ctypes.CDLL(None)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability)  # PR_CAPBSET_DROP


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_directories_that_nobody_may_enter(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "closed.txt").write_text("text")
    (tmp_path / "closed.txt").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, str(tmp_path), *FAST],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=obey_permissions,  # one thread here
    )
    (tmp_path / "closed").chmod(0o755)
    assert done.stdout.endswith("all refused\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "cut \\ud83d here"}\n', "line 1 holds half a surrogate pair"),
        ("a.jsonl", b'{"text":' + b"[" * 200_000, "line 1 is nested too deeply"),
        ("a.jsonl", b'{"text":' + b"9" * 5000 + b"}", "line 1 cannot be read"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 1: message 1"),
        ("a.parquet", b"PAR1" + b"\0" * 100, "is not a readable Parquet file"),
        ("a.txt", b"\x1f\x8b\x08\x00", "is gzip"),
        ("a.txt", b"na\xefve", "is not UTF-8"),
    ],
)
def test_a_calibration_file_that_is_no_text(
    name: str, data: bytes, says: str, tiny_llama: Path, place: Path
) -> None:
    (place / name).write_bytes(data)
    refused(place, tiny_llama, "--calibration", place / name, code=3, says=says)


def test_a_calibration_source_of_5000_characters(tiny_llama: Path, place: Path) -> None:
    refused(place, tiny_llama, "--calibration", "x" * 5000, code=3, says="name too long")
    refused(place, "x" * 5000, code=2, says="name too long")


def test_escapes_in_a_checkpoint_are_shown_as_text(tiny: TinyFactory, place: Path) -> None:
    out = place / "out" / "q\x1b[31m\n[red]"
    words = ("quantize", tiny("llama"), "--out", out, "--calibration", place / "text.txt", *FAST)
    ran = gptq(*words[:-2], "--progress", "plain")
    assert ran.code == 0, ran.stderr
    assert "\x1b" not in ran.stdout + ran.stderr
    assert all(line.startswith("[0:") for line in ran.stderr.splitlines())
    evil = {"quantizer": ["\x1b]0;PWN\x07\x1b[31mRED:1\x9b2J\u202e"]}
    for name in ("quantize_config.json", "config.json"):
        config = json.loads((out / name).read_text())
        config.get("quantization_config", config)["meta"] = evil
        (out / name).write_text(json.dumps(config))
    for more in ((), ("--verify",), ("--target", "vllm"), ("--prompt", "one", "--max-new-tokens", "2")):
        ran = gptq("load", out, *more)
        assert ran.code in (0, 5), ran.stderr
        assert not any(character in ran.stdout + ran.stderr for character in "\x1b\x07\x9b\u202e")
    assert "\\x1b]0;PWN\\x07\\x1b[31mRED:1\\x9b2J\\u202e" in "".join(gptq("load", out).stdout.split())


def test_half_characters_in_a_config_are_copied_as_json_has_them(tiny_llama: Path, place: Path) -> None:
    model = edited(tiny_llama, place)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"note": "half \ud83d, whole 😀"}))
    out = place / "out" / "q"
    assert gptq("quantize", model, "--out", out, "--calibration", place / "text.txt", *FAST).code == 0
    assert json.loads((out / "config.json").read_text())["note"] == "half \ud83d, whole 😀"
