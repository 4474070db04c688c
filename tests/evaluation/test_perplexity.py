"""Perplexity against the definition, in pieces of any size."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.errors import NonFinite
from gptq_cli.evaluation import perplexity as module
from gptq_cli.evaluation.perplexity import perplexity


class Bigram(nn.Module):
    """A model whose logits depend on the last token alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding(*table.shape)
        self.embed.weight.data = table

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.embed(input_ids))


def by_definition(table: Tensor, windows: Tensor) -> float:
    loss, count = 0.0, 0
    for window in windows.tolist():
        for before, after in itertools.pairwise(window):
            row = table[before].double()
            loss -= float(row[after] - row.logsumexp(0))
            count += 1
    return math.exp(loss / count)


@pytest.mark.parametrize("elements", [1, 30, 1 << 24])
def test_the_definition_whatever_the_pieces(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGIT_ELEMENTS", elements)
    table = torch.randn(11, 11)
    windows = torch.randint(0, 11, (3, 9))
    seen: list[tuple[int, int]] = []
    found = perplexity(Bigram(table), windows, lambda done, total: seen.append((done, total)))
    assert found.value == pytest.approx(by_definition(table, windows), rel=1e-5)
    assert (found.tokens, found.windows) == (24, 3)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary() -> None:
    assert perplexity(Bigram(torch.zeros(7, 7)), torch.tensor([[1, 2, 3]])).value == pytest.approx(7)


def test_not_a_number_is_an_error() -> None:
    table = torch.zeros(5, 5)
    table[2] = float("nan")
    with pytest.raises(NonFinite, match="window 1"):
        perplexity(Bigram(table), torch.tensor([[0, 1, 1], [0, 2, 1]]))
