"""Toy decoders, one for each way in which blocks do more than hand on their hidden states.

Each is `embed -> blocks`, called as a decoder of Transformers is: `model(input_ids=…, use_cache=False)`.
"""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, WIDTH, INNER, BLOCKS = 64, 32, 64, 3


class Block(nn.Module):
    """h + down(act(up(h))), with what a subclass does besides."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def mlp(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(hidden)))
        return out

    def forward(self, hidden: Tensor) -> Any:
        return hidden + self.mlp(hidden)


class Decoder(nn.Module):
    """The plain one: its flow is direct."""

    block: type[Block] = Block

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.scale = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(self.block() for _ in range(BLOCKS))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class SecondBlock(Block):
    def forward(self, hidden: Tensor, before: Tensor | None = None) -> Any:
        inner = torch.relu(self.up(hidden))
        if before is not None:
            inner = inner + 0.5 * before
        return hidden + self.down(inner), inner


class SecondValue(Decoder):
    """The second value of a block is an argument of the next."""

    block = SecondBlock

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden, inner = self.embed(input_ids), None
        for layer in self.layers:
            hidden, inner = layer(hidden, inner)
        return hidden


class UnusedBlock(Block):
    def forward(self, hidden: Tensor) -> Any:
        return hidden + self.mlp(hidden), hidden.sum()


class UnusedValue(Decoder):
    """Blocks return a pair that the model unpacks; the second value goes nowhere."""

    block = UnusedBlock

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return hidden


class States(UserDict[str, list[Tensor]]):
    """What blocks hand to later ones, in an object of its own kind."""


class SharingBlock(Block):
    def forward(self, *, hidden: Tensor, shared: States) -> Any:
        inner = torch.relu(self.up(hidden))
        shared.setdefault("inner", []).append(inner)
        total: Tensor = sum(shared["inner"][:-1], inner)
        return hidden + self.down(total)


class SharedState(Decoder):
    """Blocks append to an object that all of them are given; hidden states are passed by keyword."""

    block = SharingBlock

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden, shared = self.embed(input_ids), States()
        for layer in self.layers:
            hidden = layer(shared=shared, hidden=hidden)
        return hidden


class Streams(Decoder):
    """The hidden states are two streams in a tensor of four dimensions."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        one = self.embed(input_ids)
        hidden = torch.stack((one, self.scale(one)))
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.sum(0)


class Between(Decoder):
    """The model's own code, a linear outside the blocks among it, runs between two blocks."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        first = hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(0.5 * self.scale(hidden) + first)
        return hidden


class WritingBlock(Block):
    def forward(self, hidden: Tensor) -> Any:
        hidden += self.mlp(hidden)
        return hidden


class InPlace(Decoder):
    """Blocks write their sum into the tensor that they were given."""

    block = WritingBlock


class MaskedBlock(Block):
    def forward(self, bias: Tensor, hidden: Tensor) -> Any:
        return hidden + self.mlp(hidden) * bias


class SecondPlace(Decoder):
    """Each block has an argument of its own, which comes before the hidden states."""

    block = MaskedBlock

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(self.scale.weight.new_full((WIDTH,), 1.0 + index), hidden)
        return hidden


class Prompted(Decoder):
    """The hidden states have more tokens than the text: a learned prompt comes before them."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        prompt = self.scale.weight[:5].expand(len(input_ids), 5, WIDTH)
        hidden = torch.cat((prompt, self.embed(input_ids)), dim=1)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, 5:]


class Again(Decoder):
    """The whole stack of blocks is run a second time, on what it put out."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for layer in (*self.layers, *self.layers):
            hidden = layer(hidden)
        return hidden


class Twice(Decoder):
    """Every block is called twice in a row."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(layer(hidden))
        return hidden


class Backwards(Decoder):
    """The last block is called first."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for layer in reversed(self.layers):
            hidden = layer(hidden)
        return hidden


class HidingBlock(Block):
    left: list[Tensor]

    def forward(self, hidden: Tensor) -> Any:
        out = hidden + self.mlp(hidden) + sum(self.left)
        self.left.append(out)
        return out


class Hidden(Decoder):
    """Blocks leave tensors for one another in a list that is no argument."""

    block = HidingBlock

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden, left = self.embed(input_ids), []
        for layer in self.layers:
            layer.left = left
            hidden = layer(hidden)
        return hidden


class Skipping(Decoder):
    """One block is for images and never called on text."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for layer in (self.layers[0], self.layers[2]):
            hidden = layer(hidden)
        return hidden


def toy(kind: type[Decoder]) -> Decoder:
    """A decoder of `kind` with weights of unit gain, the same every time."""
    generator = torch.Generator().manual_seed(3)
    model = kind().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model
