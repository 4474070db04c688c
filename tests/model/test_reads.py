"""What counts as one input."""

from __future__ import annotations

import pytest
import torch

from gptq_cli.model.reads import Read


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_of_the_same_elements_are_the_same(device: str) -> None:
    x = torch.arange(12.0, device=device).reshape(3, 4)
    read = Read.of(x)
    assert read.same(Read.of(x))
    assert read.same(Read.of(x.view(3, 4)))
    for other in (x.view(4, 3), x.clone(), x[1:], x.t(), x.view(torch.int32)):
        assert not read.same(Read.of(other))


def test_what_was_written_to_is_another() -> None:
    x = torch.ones(3, 4)
    read, view = Read.of(x), x.view(3, 4)
    view.mul_(2)
    assert not read.same(Read.of(x))
    assert Read.of(x).same(Read.of(view))


def test_an_address_that_is_used_again_is_another() -> None:
    memory = bytearray(48)
    first = torch.frombuffer(memory, dtype=torch.float32)
    second = torch.frombuffer(memory, dtype=torch.float32)
    assert first.data_ptr() == second.data_ptr()
    assert not Read.of(first).same(Read.of(second))


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        x = torch.ones(2)
    assert Read.of(x).same(Read.of(x))
