from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gptq_cli.engine.calls import BlockCall, hidden_of
from gptq_cli.engine.capture import capture, replaced_forward, spread
from gptq_cli.errors import GptqError
from gptq_cli.model.flow import BlockShape
from tests.engine.opened import open_tiny


def test_equal_arguments_are_stored_once() -> None:
    captured = open_tiny("gemma3_text", samples=6).capture(batch_size=2)
    tensors = {
        id(value)
        for calls in captured.calls
        for call in calls
        for value in call.kwargs.values()
        if isinstance(value, torch.Tensor)
    }
    calls = sum(len(calls) for calls in captured.calls)
    assert calls >= 6
    assert len(tensors) <= 4, "one mask and one position tensor a kind of layer, not one a call"


def test_samples_and_batches() -> None:
    captured = open_tiny("llama", samples=5).capture(batch_size=2)
    assert captured.samples == [(0, 1), (2, 3), (4,)]
    assert [len(hidden) for hidden in captured.hidden] == [2, 2, 1]
    assert captured.paired == captured.share.pairs == 0
    assert captured.dense == []


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_which_samples_are_paired_does_not_depend_on_the_micro_batch(batch_size: int) -> None:
    opened = open_tiny("llama", samples=7)
    captured = opened.capture(batch_size=batch_size, paired_samples=4)
    twins = [number for batch in captured.samples[: captured.paired] for number in batch]
    assert twins == [0, 2, 4, 6]
    assert captured.share.pairs == 4
    assert sorted(number for batch in captured.samples for number in batch) == list(range(7))
    embedded = opened.model.get_input_embeddings()(opened.input_ids)
    for batch, hidden in zip(captured.samples, captured.hidden, strict=True):
        assert torch.equal(hidden, embedded[list(batch)])
    assert all(a is b for a, b in zip(captured.dense, captured.hidden, strict=False))


def test_blocks_are_as_before_afterwards() -> None:
    opened = open_tiny("llama")
    opened.capture()
    assert not any("forward" in block.__dict__ for block in opened.blocks)


def test_replaced_forward_restores_an_instance_forward() -> None:
    module = nn.Linear(2, 2)
    own = module.forward
    module.forward = own
    with pytest.raises(ZeroDivisionError), replaced_forward(module, lambda x: x):
        assert module(3) == 3
        raise ZeroDivisionError
    assert module.__dict__["forward"] is own


def test_a_block_that_is_never_called_is_an_error() -> None:
    opened = open_tiny("llama")
    stranger = nn.Linear(2, 2)
    flow = opened.flow
    shapes = {**flow.shapes, "stranger": BlockShape(carrier=0, results=None)}
    flow = replace(flow, blocks=(*flow.blocks, "stranger"), shapes=shapes)
    with pytest.raises(GptqError, match="never called its last block"):
        capture(
            opened.model.base_model,
            [*opened.blocks, stranger],
            opened.input_ids,
            flow,
            batch_size=2,
            input_device=torch.device("cpu"),
        )


def test_hidden_of_refuses_what_it_does_not_know() -> None:
    assert hidden_of((torch.ones(1), None)).item() == 1
    with pytest.raises(GptqError, match="returned dict"):
        hidden_of({"hidden": torch.ones(1)})


def test_a_call_moves_every_tensor() -> None:
    call = BlockCall((torch.ones(1), [torch.ones(1)]), {"pair": (torch.ones(1), None), "flag": True}, None)
    moved = call.to(torch.device("meta"))
    assert moved.args[0].is_meta
    assert moved.args[1][0].is_meta
    assert moved.kwargs["pair"][0].is_meta
    assert moved.kwargs["flag"] is True


def test_what_a_block_returns_beside_hidden_states_is_not_held() -> None:
    """Scores of attention, which are large."""

    class WithScores(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return hidden + 1, torch.ones(4, 4)

    call, hidden = BlockCall((), {}, hidden_only=True), torch.ones(1, 3, 2)
    for made in (call, call.to(torch.device("cpu"))):
        assert torch.equal(made(WithScores(), hidden), hidden + 1)
        assert torch.equal(made.rehearse(WithScores(), hidden), hidden + 1)
    assert isinstance(BlockCall((), {})(WithScores(), hidden), tuple)


@pytest.mark.parametrize(
    ("count", "wanted", "numbers"),
    [
        (8, 8, (0, 1, 2, 3, 4, 5, 6, 7)),
        (8, 4, (1, 3, 5, 7)),
        (8, 2, (3, 7)),
        (5, 3, (0, 2, 4)),
        (3, 1, (2,)),
        (3, 0, ()),
        (10, 3, (2, 5, 9)),
    ],
)
def test_pairs_are_spread_evenly(count: int, wanted: int, numbers: tuple[int, ...]) -> None:
    assert spread(count, wanted) == numbers
