"""Memory that is used again: one set a thread, and never where a result would be overwritten too early."""

from __future__ import annotations

import copy
import threading

import torch

from gptq_cli.inference.scratch import Fresh, Scratch, usable
from tests.checkpoint.checkpoints import Recipe
from tests.inference.test_packed_linear import build

CPU = torch.device("cpu")


def test_the_same_memory_again() -> None:
    scratch = Scratch()
    first = scratch.take("a", (4, 8), torch.float32, CPU)
    again = scratch.take("a", (2, 3), torch.float32, CPU)
    assert first.data_ptr() == again.data_ptr()
    assert again.shape == (2, 3)
    assert scratch.take("b", (2, 3), torch.float32, CPU).data_ptr() != first.data_ptr()
    assert scratch.take("a", (2, 3), torch.int8, CPU).dtype == torch.int8
    assert scratch.take("a", (100,), torch.float32, CPU).numel() == 100


def test_fresh_memory_is_new() -> None:
    first = Fresh().take("a", (4,), torch.float32, CPU)
    assert Fresh().take("a", (4,), torch.float32, CPU).data_ptr() != first.data_ptr()


def test_every_thread_has_its_own() -> None:
    scratch = Scratch()
    mine = scratch.take("a", (16,), torch.float32, CPU)
    theirs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: theirs.append(scratch.take("a", (16,), torch.float32, CPU)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()


def test_copies_of_a_module_have_their_own() -> None:
    linear, packed, _ = build(Recipe(group_size=32))
    copied = copy.deepcopy(linear)
    x = torch.randn(40, 256).bfloat16()
    assert torch.equal(copied(x), linear(x))
    assert copied._scratch is not linear._scratch
    assert packed.weight.shape == (96, 256)


def test_memory_of_inference_mode_serves_outside_too() -> None:
    linear, _, _ = build(Recipe(group_size=32), dtype=torch.float32)
    x = torch.randn(3, 256)
    with torch.inference_mode():
        expected = linear(x).clone()
    assert torch.equal(linear(x), expected)


def test_gradients_of_the_input() -> None:
    """Two linears share the scratch: the weight that a backward pass needs must not be overwritten."""
    first, packed, _ = build(Recipe(group_size=32), rows=256, dtype=torch.float32)
    second, other, _ = build(Recipe(bits=8, group_size=64), rows=64, dtype=torch.float32)
    second._scratch = first._scratch
    x = torch.randn(3, 256, requires_grad=True)
    assert not usable(x)
    second(first(x)).sum().backward()
    expected = torch.ones(3, 64).double() @ other.weight @ packed.weight
    assert x.grad is not None
    assert (x.grad.double() - expected).norm() / expected.norm() < 1e-5
    assert usable(x.detach())
