"""A sample of Transformers' architectures, quantized as tiny models and read twice; scripts/architectures.py
has them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import architectures
from tests.second_opinion import examine, save_source

DENSE = (
    "llama",
    "qwen3",
    "gemma2",
    "olmo2",
    "gpt2",
    "falcon",
    "opt",
    "phi3",
    "cohere2",
    "modernbert-decoder",
)
EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "jetmoe", "dbrx")
HYBRID = ("mamba", "bamba", "zamba2", "qwen3_next", "gemma3n_text")
TOWERS = ("qwen2_5_vl", "gemma3", "llava", "llama4", "idefics3")


@pytest.mark.parametrize("kind", [*DENSE, *EXPERTS, *HYBRID, *TOWERS])
def test_right(kind: str, tmp_path: Path) -> None:
    """Verified, loaded, equal to the second reading, and better than rounding to nearest."""
    model = architectures.build(kind)
    found = examine(type(model), save_source(model, tmp_path), tmp_path / "out", recipe="balanced")
    assert found.problem == ""
    if kind in EXPERTS:
        assert found.share >= 0.97


def test_a_wrong_reading_is_seen(tmp_path: Path) -> None:
    model = architectures.build("llama")
    source = save_source(model, tmp_path)
    right = examine(type(model), source, tmp_path / "out")
    other = architectures.build("llama", seed=1)
    (tmp_path / "other").mkdir()
    wrong = save_source(other, tmp_path / "other")
    wrong_reading = examine(type(model), wrong, tmp_path / "out2")
    assert right.problem == wrong_reading.problem == ""
    assert right.kl != wrong_reading.kl
