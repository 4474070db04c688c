"""Speed is measured in rounds; the warm-up does not count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from gptq_cli.errors import CheckpointError, ConfigError
from gptq_cli.evaluation import speed as benchmark
from gptq_cli.evaluation.speed import measure_speed
from tests.checkpoint.checkpoints import Recipe, quantize_directory
from tests.inference.test_load import load


def test_rates_of_a_model(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    rounds: list[tuple[int, int]] = []
    speed = measure_speed(
        load(tmp_path / "q"),
        prompt_tokens=8,
        new_tokens=3,
        rounds=2,
        on_round=lambda done, total: rounds.append((done, total)),
    )
    assert rounds == [(0, 2), (1, 2), (2, 2)]
    assert speed.prompt.tokens_per_second > 0
    assert speed.decode.tokens_per_second > 0
    assert (speed.prompt_tokens, speed.new_tokens, speed.rounds) == (8, 3, 2)


def test_a_model_that_keeps_no_cache_is_named() -> None:
    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 8)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.embedding

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=self.embedding(input_ids))

    with pytest.raises(CheckpointError, match="Forgets keeps no cache") as caught:
        measure_speed(Forgets(), prompt_tokens=4, new_tokens=2, rounds=1)
    assert caught.value.hint == "leave --bench out"


def test_median_and_quartiles(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    model = load(tmp_path / "q")
    times = iter([(9.0, 9.0), (1.0, 2.0), (2.0, 1.0), (4.0, 0.5)])
    monkeypatch.setattr(benchmark, "_one_round", lambda *_: next(times))
    speed = measure_speed(model, prompt_tokens=8, new_tokens=4, rounds=3)
    assert speed.prompt.tokens_per_second == 4.0
    assert speed.prompt.spread == 3.0  # quartiles of 2, 4 and 8: 3 and 6
    assert speed.decode.tokens_per_second == 4.0


@pytest.mark.parametrize("field", ["prompt_tokens", "new_tokens", "rounds"])
def test_numbers_are_checked(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        measure_speed(None, **{field: 0})
