"""The model card of a real run: what it carries over, and that its digests are those of the files."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

import gptq_cli
from tests.e2e.commands import FAST, gptq, write_text

SOURCE = "---\nlicense: mit\ntags: [chat]\nlanguage: en\n---\n# The dense model\n"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "tiny-model"))
    (copy / "README.md").write_text(SOURCE, encoding="utf-8")
    return copy


def test_a_checkpoint_has_a_card(model: Path, tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "q"
    made = gptq("quantize", model, "--out", out, "--calibration", text, *FAST)
    assert made.code == 0, made.stderr
    card = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"], front["language"]) == ("tiny-model", "mit", ["en"])
    assert front["tags"] == ["chat", "gptq", "4-bit", "gptq-cli"]
    assert (out / "loss_per_block.svg").is_file()
    assert str(tmp_path) not in card
    assert "--calibration text.txt --samples 8 --seq-len 48" in card
    digests = re.findall(r"^([0-9a-f]{64})  (\S+)$", card, re.MULTILINE)
    assert {name for _, name in digests} == {"config.json", "model.safetensors", "quantize_config.json"}
    for digest, name in digests:
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert gptq("load", out, "--verify", "--progress", "none").code == 0


def test_without_a_card(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    words = ("--calibration", text, "--card", "none", *FAST)
    assert gptq("quantize", model, "--out", tmp_path / "a", *words).code == 0
    gptq_cli.quantize(
        model, tmp_path / "b", calibration=text, samples=8, seq_len=48, group_size=32, card="none"
    )
    for name in "ab":
        assert not {"README.md", "loss_per_block.svg"} & {p.name for p in (tmp_path / name).iterdir()}


def test_a_card_of_the_source_that_cannot_be_read_is_a_warning(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\na: [\n---\n", encoding="utf-8")
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "q"
    words = ("--calibration", text, *FAST, "--progress", "plain", "--json")
    made = gptq("quantize", model, "--out", out, *words)
    assert made.code == 0, made.stderr
    assert "README.md of the model cannot be used" in made.stderr
    assert "license" not in yaml.safe_load((out / "README.md").read_text().split("---\n")[1])


def test_several_sources_of_text(model: Path, tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "q"
    words = (*FAST, "--calibration", f"{text}*3", "--calibration", "pydoc*1", "--json")
    made = gptq("quantize", model, "--out", out, *words)
    assert made.code == 0, made.stderr
    texts = json.loads((out / "report.json").read_text())["calibration_texts"]
    assert [(one["weight"], one["samples"], one["tokens"]) for one in texts] == [(3, 6, 288), (1, 2, 96)]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "--calibration 'text.txt*3' --calibration pydoc" in " ".join(card.replace("\\", " ").split())
