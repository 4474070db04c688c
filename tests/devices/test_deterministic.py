"""Deterministic kernels are asked for where there is a choice, and only inside the `with`."""

from __future__ import annotations

import pytest
import torch

from gptq_cli.devices.deterministic import deterministic, not_deterministic


def test_it_holds_inside_and_on_accelerators_alone() -> None:
    with pytest.raises(KeyError), deterministic(torch.device("cuda:0")):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_what_was_asked_for_already_stays() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(torch.device("cuda:0")):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_function_without_such_a_kernel_is_known_by_its_error() -> None:
    with deterministic(torch.device("cuda:0")), pytest.raises(RuntimeError) as caught:
        torch.ones(2).put_(torch.tensor([0]), torch.ones(1))
    assert not_deterministic(caught.value)
    assert not not_deterministic(RuntimeError("shapes differ"))
