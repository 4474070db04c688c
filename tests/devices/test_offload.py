"""The life of the offload hooks, on the CPU with an explicit execution device."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import CpuOffload, attach_align_device_hook_on_blocks
from torch import nn

from gptq_cli.devices import offload
from gptq_cli.devices.offload import replace_dispatch_hooks
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import Placement, PlacementEntry
from tests.tiny import tiny_model

CUDA = Device("cuda", 0)
OFFLOADED = ("model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")


def placement(*cpu: str) -> Placement:
    """A llama with `cpu` on cpu and the rest on an accelerator that is not there."""
    names = (
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.layers.2",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    )
    entries = tuple(
        PlacementEntry(name, CPU if name in cpu else CUDA, 1, name != "model.rotary_emb") for name in names
    )
    return Placement(entries, CUDA, "test")


@pytest.fixture
def model() -> nn.Module:
    made: nn.Module = tiny_model("llama")
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> Iterator[list[tuple[str, ...]]]:
    """Removals, registrations and moves of whole entries, as they happen."""
    seen: list[tuple[str, ...]] = []
    names = {id(module): name for name, module in model.named_modules()}
    remove: Callable[..., Any] = offload.remove_hook_from_module

    def spy_remove(module: nn.Module, recurse: bool = False) -> nn.Module:
        seen.append(("remove", names[id(module)], str(recurse)))
        return remove(module, recurse)  # type: ignore[no-any-return]

    def spy_register(module: nn.Module, device: object, prev_module_hook: Any = None) -> Any:
        before = names[id(prev_module_hook.model)] if prev_module_hook else ""
        seen.append(("register", names[id(module)], before))
        return cpu_offload_with_hook(module, device, prev_module_hook=prev_module_hook)

    monkeypatch.setattr(offload, "remove_hook_from_module", spy_remove)
    monkeypatch.setattr(offload, "cpu_offload_with_hook", spy_register)
    return seen


def dispatched(model: nn.Module, cpu: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Hook the model as accelerate's dispatch does: the weights of `cpu` entries leave for meta."""
    entries = {entry.name: entry.name in cpu for entry in placement(*cpu).entries}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach_align_device_hook_on_blocks(
        model,
        execution_device=dict.fromkeys([*entries, ""], "cpu"),
        offload=entries | {"": False},
        weights_map=weights,
    )
    return weights


def hooks_of(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [
        f"{name}.{inner}"
        for name in names
        for inner, module in model.get_submodule(name).named_modules()
        if hasattr(module, "_hf_hook") or hasattr(module, "_old_forward") or "forward" in module.__dict__
    ]


def test_every_cpu_entry_loses_its_hooks_once_and_links_to_the_one_before_it(
    model: nn.Module, calls: list[tuple[str, ...]]
) -> None:
    with replace_dispatch_hooks(model, placement(*OFFLOADED), "cpu") as chain:
        during = list(calls)
    assert during == [
        ("remove", "model.layers.1", "True"),
        ("register", "model.layers.1", ""),
        ("remove", "model.layers.2", "True"),
        ("register", "model.layers.2", "model.layers.1"),
        ("remove", "model.norm", "True"),
        ("register", "model.norm", "model.layers.2"),
        ("remove", "model.rotary_emb", "True"),
        ("remove", "lm_head", "True"),
        ("register", "lm_head", "model.norm"),
    ]
    assert chain.hooked == ("model.layers.1", "model.layers.2", "model.norm", "lm_head")
    assert chain.skipped == ("model.rotary_emb",)
    after = calls[len(during) :]
    assert after == [("remove", name, "True") for name in reversed(OFFLOADED)]


def test_hooks_are_gone_afterwards(model: nn.Module) -> None:
    with replace_dispatch_hooks(model, placement(*OFFLOADED), "cpu"):
        linked = [name for name in OFFLOADED if hasattr(model.get_submodule(name), "_hf_hook")]
        assert linked == [name for name in OFFLOADED if name != "model.rotary_emb"]
        hook: Any = model.get_submodule("model.norm")._hf_hook
        assert isinstance(hook, CpuOffload)
    assert hooks_of(model, OFFLOADED) == []


def test_weights_come_back_from_accelerates_dispatch(model: nn.Module) -> None:
    weights = dispatched(model, OFFLOADED)
    name = "model.layers.1.mlp.down_proj"
    linear = model.get_submodule(name)
    assert linear.weight.device.type == "meta"
    assert hasattr(linear, "_hf_hook")
    with replace_dispatch_hooks(model, placement(*OFFLOADED), "cpu"):
        assert linear.weight.device.type == "cpu"
        assert torch.equal(linear.weight, weights[f"{name}.weight"])
        assert not hasattr(linear, "_hf_hook")
    assert hooks_of(model, OFFLOADED) == []
    assert all(not p.is_meta for name in OFFLOADED for p in model.get_submodule(name).parameters())


def test_forward_runs_through_the_chain_and_equals_the_plain_one(model: nn.Module) -> None:
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        dispatched(model, OFFLOADED)
        with replace_dispatch_hooks(model, placement(*OFFLOADED), "cpu"):
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_the_naive_chain_dies_of_rotary_emb(model: nn.Module) -> None:
    """Why parameter-less entries are skipped: accelerate itself raises StopIteration."""
    _, hook = cpu_offload_with_hook(model.get_submodule("model.rotary_emb"), torch.device("cpu"))
    cpu_offload_with_hook(model.get_submodule("lm_head"), torch.device("cpu"), prev_module_hook=hook)
    with pytest.raises((StopIteration, RuntimeError)), torch.no_grad():
        model(input_ids=torch.arange(4).reshape(1, 4))


def test_exception_restores(model: nn.Module) -> None:
    dispatched(model, OFFLOADED)
    with (
        pytest.raises(ValueError, match="middle"),
        replace_dispatch_hooks(model, placement(*OFFLOADED), "cpu"),
    ):
        raise ValueError("in the middle")
    assert hooks_of(model, OFFLOADED) == []


def test_failure_while_hooking_restores(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = cpu_offload_with_hook, []

    def fails_at_third(*args: Any, **kwargs: Any) -> Any:
        if len(made) == 2:
            raise RuntimeError("no room")
        made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(offload, "cpu_offload_with_hook", fails_at_third)
    manager = replace_dispatch_hooks(model, placement(*OFFLOADED), "cpu")
    with pytest.raises(RuntimeError, match="no room"):
        manager.__enter__()
    assert hooks_of(model, OFFLOADED) == []


def test_sigint_restores(model: nn.Module) -> None:
    dispatched(model, OFFLOADED)
    with (
        pytest.raises(KeyboardInterrupt),
        replace_dispatch_hooks(model, placement(*OFFLOADED), "cpu") as chain,
        chain.on_device("model.layers.1"),
    ):
        signal.raise_signal(signal.SIGINT)
    assert hooks_of(model, OFFLOADED) == []
    assert all(p.device.type == "cpu" for p in model.get_submodule("model.layers.1").parameters())


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[tuple[str, str]]:
    """Moves of named modules; they are noted, not made, so that any device can be asked for."""
    seen: list[tuple[str, str]] = []
    names = {id(module): name for name, module in model.named_modules()}

    def to(self: nn.Module, device: object) -> nn.Module:
        seen.append((names[id(self)], str(device)))
        return self

    monkeypatch.setattr(nn.Module, "to", to)
    return seen


def test_a_block_moves_to_the_execution_device_and_back(
    model: nn.Module, moves: list[tuple[str, str]]
) -> None:
    with replace_dispatch_hooks(model, placement(*OFFLOADED)) as chain:
        moves.clear()
        with chain.on_device("model.layers.2"):
            assert moves == [("model.layers.2", "cuda:0")]
        assert moves == [("model.layers.2", "cuda:0"), ("model.layers.2", "cpu")]
        moves.clear()
        with chain.on_device("model.layers.0"):
            pass
        assert moves == []


def test_a_block_returns_to_the_cpu_after_an_exception(
    model: nn.Module, moves: list[tuple[str, str]]
) -> None:
    with replace_dispatch_hooks(model, placement(*OFFLOADED)) as chain:
        moves.clear()
        with pytest.raises(ValueError, match="x"), chain.on_device("model.layers.1"):
            raise ValueError("x")
        assert moves[-1] == ("model.layers.1", "cpu")


def test_the_last_link_returns_to_the_cpu_too(model: nn.Module, moves: list[tuple[str, str]]) -> None:
    with replace_dispatch_hooks(model, placement(*OFFLOADED)) as chain:
        moves.clear()
        chain.return_to_cpu()
        assert moves == [(name, "cpu") for name in chain.hooked]
        moves.clear()
    homes = [name for name, device in moves if device == "cpu"]
    assert set(OFFLOADED) <= set(homes)


def test_buffers_of_a_skipped_entry_go_to_the_execution_device_and_back(
    model: nn.Module, moves: list[tuple[str, str]]
) -> None:
    with replace_dispatch_hooks(model, placement(*OFFLOADED)):
        assert ("model.rotary_emb", "cuda:0") in moves
        moves.clear()
    assert ("model.rotary_emb", "cpu") in moves


@pytest.mark.parametrize("value", [Device("cuda", 1), torch.device("cuda:1"), "cuda:1", 1])
def test_execution_device_is_a_torch_device_with_an_index_whatever_it_was_called(
    model: nn.Module, moves: list[tuple[str, str]], value: object
) -> None:
    with replace_dispatch_hooks(model, placement("model.norm"), value) as chain:
        assert chain.device == torch.device("cuda:1")
        hook: Any = model.get_submodule("model.norm")._hf_hook
        assert hook.execution_device == torch.device("cuda:1")


def test_main_device_is_the_default(model: nn.Module, moves: list[tuple[str, str]]) -> None:
    with replace_dispatch_hooks(model, placement("model.norm")) as chain:
        assert chain.device == torch.device("cuda:0")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_one_device_touches_nothing(model: nn.Module, calls: list[tuple[str, ...]], device: Device) -> None:
    with replace_dispatch_hooks(
        model, Placement((PlacementEntry("", device, 1, True),), device, "test")
    ) as chain:
        assert chain.hooked == chain.skipped == ()
        with chain.on_device("model.layers.0"):
            chain.return_to_cpu()
    assert calls == []
