"""Blocks and linears by structure, and the weight as (N, K) whichever way it is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from gptq_cli.errors import ModelError
from gptq_cli.model.blocks import assign, find_blocks, find_linears, is_linear, shape, weight_matrix


class Twice(nn.Linear):
    """A subclass that is not a plain linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Picky(nn.Linear):
    """A subclass whose constructor cannot be called like a linear's."""

    def __init__(self, config: object) -> None:
        raise RuntimeError("no")

    def forward(self, x: Tensor) -> Tensor:
        return x


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.gate = nn.Linear(width, 4)
        self.score = nn.Linear(width, 1)
        self.experts = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(9)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(20)])
        self.small = nn.ModuleList([nn.Linear(8, 8) for _ in range(12)])
        self.stack = nn.Module()
        self.stack.layers = nn.ModuleList([Block(8) for _ in range(3)])
        self.head = nn.Linear(8, 4096)


def test_the_outermost_list_with_most_weights() -> None:
    assert find_blocks(Model()) == ("stack.layers", ("stack.layers.0", "stack.layers.1", "stack.layers.2"))


def test_routers_stay_out() -> None:
    assert list(find_linears(Block(8))) == ["up", *(f"experts.{i}" for i in range(9))]


def test_no_blocks() -> None:
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_which_classes_are_linears() -> None:
    assert is_linear(nn.Linear(4, 4))
    assert is_linear(Renamed(4, 4))
    assert is_linear(FalconLinear(4, 4))
    assert is_linear(Conv1D(4, 8))
    assert not is_linear(Twice(4, 4))
    assert not is_linear(Picky.__new__(Picky))
    assert not is_linear(nn.MultiheadAttention(8, 2).out_proj)
    assert not is_linear(nn.Embedding(4, 4))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_weight_matrix_and_assign(kind: str) -> None:
    linear = nn.Linear(6, 4) if kind == "linear" else Conv1D(4, 6)
    x = torch.randn(5, 6)
    W = weight_matrix(linear)
    assert shape(linear) == tuple(W.shape) == (4, 6)
    assert not W.requires_grad
    torch.testing.assert_close(linear(x), x @ W.t() + linear.bias)
    new = torch.randn(4, 6, dtype=torch.float64)
    before = linear.weight.data_ptr()
    assign(linear, new)
    assert linear.weight.data_ptr() == before
    torch.testing.assert_close(linear(x), x @ new.float().t() + linear.bias)
