"""`--calibration self` and `--eval self` by the real commands: planned, written once, kept, gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gptq_cli.calibration import own_text
from gptq_cli.errors import CalibrationError
from gptq_cli.jobs import checking
from gptq_cli.model import running
from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, gptq, write_text
from tests.e2e.test_resume import stop_after

SELF = ("--calibration", "self", "--recipe", "fast", *FAST)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*.safetensors")}


def test_a_model_writes_its_text_once(tiny_llama: Path, tmp_path: Path, cache: Path) -> None:
    made = gptq("quantize", tiny_llama, "--out", tmp_path / "a", *SELF, "--json")
    assert made.code == 0, made.stderr
    report = made.document
    assert report["calibration_texts"] == [{"source": "self", "weight": 1, "samples": 8, "tokens": 384}]
    assert report["phase_seconds"]["write"] > 0
    text = kept(cache)
    assert len(text) == 1
    again = gptq("quantize", tiny_llama, "--out", tmp_path / "b", *SELF, "--json")
    assert again.document["dataset_sha256"] == report["dataset_sha256"]
    assert "write" not in again.document["phase_seconds"]
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    shutil.rmtree(cache)
    anew = gptq("quantize", tiny_llama, "--out", tmp_path / "c", *SELF, "--json")
    assert anew.document["dataset_sha256"] == report["dataset_sha256"]
    assert kept(cache) == text


def test_the_plan_says_how_long_it_writes_and_writes_nothing(
    tiny_llama: Path, tmp_path: Path, cache: Path
) -> None:
    plan = gptq("quantize", tiny_llama, *SELF, "--dry-run", "--json").document
    assert 0 < plan["plan"]["writing_seconds"] < plan["plan"]["seconds"]
    assert plan["ok"]
    shown = gptq("quantize", tiny_llama, *SELF, "--dry-run").stdout
    assert "of them to write the calibration text" in " ".join(shown.split())
    assert not kept(cache)
    assert gptq("quantize", tiny_llama, "--out", tmp_path / "a", *SELF).code == 0
    later = gptq("quantize", tiny_llama, *SELF, "--dry-run", "--json").document
    assert later["plan"]["writing_seconds"] is None  # it is kept


def test_beside_another_text(tiny_llama: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    words = ("--calibration", "self*1", "--calibration", f"{text}*3", "--recipe", "fast", *FAST, "--json")
    made = gptq("quantize", tiny_llama, "--out", tmp_path / "a", *words)
    assert made.code == 0, made.stderr
    assert [one["samples"] for one in made.document["calibration_texts"]] == [2, 6]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_other_architectures(name: str, tiny: TinyFactory, tmp_path: Path) -> None:
    made = gptq("quantize", tiny(name), "--out", tmp_path / "a", *SELF, "--json")
    assert made.code == 0, made.stderr
    assert made.document["tokens"] == 384


def test_an_interruption_keeps_what_is_written(
    tiny_llama: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "MAX_ROWS", 2)
    real, batches = own_text.write_rows, []

    def stopped(*words: object) -> object:
        batches.append(1)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(*words)

    monkeypatch.setattr(own_text, "write_rows", stopped)
    command = ("quantize", tiny_llama, "--out", tmp_path / "a", *SELF)
    made = gptq(*command, interrupted=True)
    assert made.code == 130
    assert "192 of 384 tokens are kept" in made.stderr
    assert "to go on: " in made.stderr
    assert len(kept(cache)) == 2
    made = gptq(*command[:-2], "--progress", "plain")
    assert made.code == 0, made.stderr
    assert "192 tokens, 192 kept" in made.stderr
    assert len(batches) == 5


def test_an_interrupted_run_goes_on_with_the_same_text(
    tiny_llama: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gptq("quantize", tiny_llama, "--out", tmp_path / "whole", *SELF)
    assert whole.code == 0, whole.stderr
    command = ("quantize", tiny_llama, "--out", tmp_path / "a", *SELF, "--json")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert gptq(*command).code == 1
    shutil.rmtree(cache)  # the text is written again, and is the same
    made = gptq(*command)
    assert made.code == 0, made.stderr
    assert [start["first_block"] for start in made.document["starts"]] == [0, 1]
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_that_cannot_write_is_refused_before_the_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "CACHE_NAMES", ("state",))
    monkeypatch.setattr(checking, "write_first", None)  # nothing is written
    made = gptq("quantize", tiny_llama, "--out", tmp_path / "a", *SELF, "--json")
    assert made.code == 3
    (found,) = (one for one in made.document["error"]["findings"] if one["level"] == "error")
    assert found["rule"] == "calibration-text"
    assert "LlamaForCausalLM cannot write text" in found["message"]
    assert not (tmp_path / "a").exists()


def test_no_room_for_the_whole_model_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checking.writing_needs
    monkeypatch.setattr(
        checking,
        "writing_needs",
        lambda facts, plans, main, cache, rows: real(facts, plans, main, 1 << 50, rows),
    )
    made = gptq("quantize", tiny_llama, "--out", tmp_path / "a", *SELF, "--json")
    assert made.code == 3
    found = [one["rule"] for one in made.document["error"]["findings"] if one["level"] == "error"]
    assert found == ["own-text-memory"]


def test_measured_on_what_the_dense_model_writes(tiny_llama: Path, tmp_path: Path, cache: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    words = ("--calibration", text, "--recipe", "fast", *FAST, "--eval", "self", "--against-source", "--json")
    made = gptq("quantize", tiny_llama, "--out", tmp_path / "q", *words)
    assert made.code == 0, made.stderr
    proof = made.document["proof"]
    assert (proof["text_source"], proof["answers_only"]) == ("self", True)
    assert 0 < proof["agreement"]["tokens"] < proof["windows"] * proof["seq_len"]
    assert "self, the answers alone" in (tmp_path / "q" / "README.md").read_text(encoding="utf-8")
    text_kept = kept(cache)
    again = gptq("load", tmp_path / "q", "--against", tiny_llama, "--eval", "self", "--json", "--quiet")
    assert again.document["agreement"] == proof["agreement"]
    assert kept(cache) == text_kept


def test_what_the_model_writes_to_be_measured_on_is_another_text(tiny_llama: Path, tmp_path: Path) -> None:
    made = gptq("quantize", tiny_llama, "--out", tmp_path / "q", *SELF, "--json")
    words = ("--against", tiny_llama, "--eval", "self", "--seq-len", "48", "--windows", "8")
    loaded = gptq("load", tmp_path / "q", *words, "--json", "--quiet")
    assert (made.code, loaded.code) == (0, 0), loaded.stderr


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [(("load", "Q", "--eval", "self"),
      "eval is self, the text that the dense model writes, and no dense model is named", "--against MODEL"),
     (("quantize", "M", "--out", "Q", "--eval", "self"),
      "eval is self, which the dense model writes, but nothing is compared with that model",
      "--against-source")],
)  # fmt: skip
def test_own_text_needs_the_dense_model(words: tuple[str, ...], message: str, hint: str) -> None:
    ran = gptq(*words)
    assert ran.code == 2
    assert message in ran.stderr
    assert hint in ran.stderr


def test_conversations_are_measured_on_their_answers(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer " * 9}]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(f"{json.dumps({'messages': talk})}\n" for _ in range(20)))
    text = write_text(tmp_path / "text.txt")
    made = gptq("quantize", model, "--out", tmp_path / "q", "--calibration", text, "--recipe", "fast", *FAST)
    assert made.code == 0, made.stderr
    words = ("load", tmp_path / "q", "--eval", f"{chat}:messages", "--seq-len", "128", "--json", "--quiet")
    alone, against = gptq(*words), gptq(*words, "--against", model)
    assert (alone.code, against.code) == (0, 0), alone.stderr + against.stderr
    assert alone.document["answers_only"]
    assert alone.document["perplexity"] == pytest.approx(against.document["perplexity"], rel=1e-4)
    found = against.document["agreement"]
    assert found["tokens"] < 128 * found["windows"] * 0.9


def test_a_model_that_turns_out_not_to_write_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: object, form: object) -> None:
        raise CalibrationError("LlamaForCausalLM returns no cache to go on from")

    monkeypatch.setattr(own_text, "check_decoding", fails)
    made = gptq("quantize", tiny_llama, "--out", tmp_path / "out" / "a", *SELF)
    assert made.code == 2
    assert "returns no cache to go on from" in made.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
