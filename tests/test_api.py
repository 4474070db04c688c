"""The one function that the package offers to Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gptq_cli
from gptq_cli.errors import CheckpointError, ConfigError
from tests.e2e.commands import FAST, gptq, write_text


def test_load_gives_a_model_that_generates(tiny_llama: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    assert gptq("quantize", tiny_llama, "--out", tmp_path / "q", "--calibration", text, *FAST).code == 0
    model = gptq_cli.load(str(tmp_path / "q"), device_map="cpu")
    made = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)
    same = gptq_cli.load(str(tmp_path / "q"))
    assert torch.equal(same(made).logits, model(made).logits)


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        gptq_cli.load(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="dtype is 'int3'"):
        gptq_cli.load(str(tmp_path), dtype="int3")
