"""Blocks of every shape: each sees what the model's own forward gives it, in both streams."""

from __future__ import annotations

import copy
import threading
import time
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine.calls import BlockCall
from gptq_cli.engine.capture import BlockInputs, HiddenStates, capture
from gptq_cli.engine.driven import Driven, ModelForward
from gptq_cli.engine.loop import LoopOptions, quantize_blocks
from gptq_cli.engine.work import Block
from gptq_cli.errors import GptqError
from gptq_cli.events import Warned
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.model.blocks import find_blocks, find_linears, shape
from gptq_cli.model.flow import Flow, tensors_in
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.model.trace import trace
from gptq_cli.placement.device import CPU
from gptq_cli.placement.schedule import BlockSchedule, ReplayReason
from gptq_cli.results.run import BlockReport
from tests.engine import shapes_of_blocks as shapes
from tests.tiny import randomize

DIRECT = (shapes.Decoder, shapes.Again, shapes.UnusedValue, shapes.InPlace, shapes.SecondPlace)
DRIVEN = (shapes.SecondValue, shapes.SharedState, shapes.Streams, shapes.Between, shapes.Prompted)


def flow_of(model: nn.Module, blocks: list[str]) -> Flow:
    return trace(copy.deepcopy(model).to("meta"), {}, blocks).flow


def entered(model: nn.Module, blocks: list[nn.Module], ids: Tensor) -> list[list[Tensor]]:
    """Every tensor that each block is given in the model's own forward over `ids`."""
    given: list[list[Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append([tensor.clone() for tensor in tensors_in((args, kwargs))])

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return given


@dataclass
class Noting:
    """Hands on what `states` does, and notes every tensor that enters each block, for each micro-batch."""

    states: Any
    given: list[list[list[Tensor]]]
    dense: list[list[list[Tensor]]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.states, name)

    def enter(self, index: int, device: torch.device, rest: torch.device) -> BlockInputs:
        inputs: BlockInputs = self.states.enter(index, device, rest)
        for calls, hidden, into in (
            (inputs.calls, inputs.hidden, self.given),
            (inputs.dense_calls, inputs.dense, self.dense),
        ):
            into.append(
                [
                    [tensor.clone() for tensor in tensors_in((x, call.args, call.kwargs))]
                    for call, x in zip(calls, hidden, strict=True)
                ]
            )
        return inputs


@dataclass
class Work:
    """A model after its blocks were quantized in place."""

    noted: Noting
    packed: dict[str, PackedTensors]
    reports: tuple[BlockReport, ...]
    warnings: list[str]


def quantized(
    model: Any,
    blocks: list[str],
    flow: Flow,
    ids: Tensor,
    *,
    replayed: ReplayReason | None = None,
    batch_size: int = 2,
) -> Work:
    modules = [model.get_submodule(name) for name in blocks]
    config = QuantizeConfig.of("balanced", group_size=16)
    options = {"batch_size": batch_size, "input_device": torch.device("cpu"), "paired_samples": 3}
    states: HiddenStates
    decoder = getattr(model, "base_model", model)
    if flow.direct:
        states = capture(decoder, modules, ids, flow, **options)
    else:
        states = Driven(decoder, modules, ids, flow, **options)
    noted = Noting(states, [], [])
    packed: dict[str, PackedTensors] = {}
    warnings: list[str] = []
    try:
        reports = quantize_blocks(
            [
                Block(
                    BlockSchedule(
                        name=name,
                        storage_device=CPU,
                        execution_device=CPU,
                        replayed=replayed,
                        expert_batch_bytes=1 << 30,
                        solve_batch_rows=1 << 20,
                    ),
                    module,
                    linears_of(name, module),
                )
                for name, module in zip(blocks, modules, strict=True)
            ],
            noted,
            config,
            LoopOptions(strict=False, devices=(CPU,)),
            lambda info, tensors: packed.__setitem__(info.name, tensors),
            lambda event: warnings.append(event.message) if isinstance(event, Warned) else None,
        )
    finally:
        states.close()
    return Work(noted, packed, reports, warnings)


def linears_of(block: str, module: nn.Module) -> tuple[LinearInfo, ...]:
    infos = []
    for name, linear in find_linears(module).items():
        rows, columns = shape(linear)
        if rows % 8 or columns % 16:
            continue
        infos.append(
            LinearInfo(
                name=f"{block}.{name}",
                block=block,
                source_key=f"{block}.{name}.weight",
                in_features=columns,
                out_features=rows,
                bias=getattr(linear, "bias", None) is not None,
                transposed=False,
            )
        )
    return tuple(infos)


def check(model: Any, blocks: list[str], *, direct: bool, replayed: ReplayReason | None = None) -> Work:
    """Quantize `model` in place and compare what entered each block with the forward of the result, and for
    the dense stream with that of the model as it was."""
    before = copy.deepcopy(model)
    flow = flow_of(model, blocks)
    assert flow.obstacle == ""
    assert flow.direct is direct, flow.between
    ids = torch.randint(2, 60, (5, 24), generator=torch.Generator().manual_seed(1))
    threads = count_forwards()
    work = quantized(model, blocks, flow, ids, replayed=replayed)
    assert count_forwards() == threads, "forwards of the model are left open"
    after = [model.get_submodule(name) for name in blocks]
    for stream, dense in ((work.noted.given, False), (work.noted.dense, True)):
        whole = before if dense else model
        modules = [whole.get_submodule(name) for name in blocks]
        for place, batch in enumerate(work.noted.share.batches[: 2 if dense else None]):
            theirs = entered(getattr(whole, "base_model", whole), modules, ids[list(batch)])
            for index in range(len(blocks)):
                ours = stream[index][place]
                assert len(ours) == len(theirs[index])
                for a, b in matched(ours, theirs[index]):
                    assert torch.equal(a, b), (blocks[index], place, dense)
    for block, module in zip(blocks, after, strict=True):
        for info in linears_of(block, module):
            weight = module.get_submodule(info.name.removeprefix(f"{block}.")).weight
            torch.testing.assert_close(dequantized(work.packed[info.name]), weight, atol=2e-3, rtol=2e-3)
    return work


def matched(ours: list[Tensor], theirs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of equal shape, whatever the order of the arguments."""
    rest, pairs = list(theirs), []
    for tensor in ours:
        same = [place for place, other in enumerate(rest) if other.shape == tensor.shape]
        assert same
        best = next((place for place in same if torch.equal(rest[place], tensor)), same[0])
        pairs.append((tensor, rest.pop(best)))
    return pairs


def count_forwards() -> int:
    return sum(isinstance(thread, ModelForward) for thread in threading.enumerate())


def dequantized(packed: PackedTensors) -> Tensor:
    """W (N, K) from the words of the checkpoint, written for this test alone: 4 bits, groups of 16, sym."""
    shifts = torch.arange(0, 32, 4)
    codes = (packed.qweight[:, None, :] >> shifts[None, :, None]) & 15  # (K / 8, 8, N)
    codes = codes.reshape(-1, packed.qweight.shape[1])  # (K, N)
    scales = packed.scales.float().repeat_interleave(codes.shape[0] // packed.scales.shape[0], dim=0)
    return ((codes - 8) * scales).T


@pytest.mark.parametrize("replayed", [None, "memory"])
@pytest.mark.parametrize("kind", [*DIRECT, *DRIVEN])
def test_each_block_sees_what_the_model_gives_it(
    kind: type[shapes.Decoder], replayed: ReplayReason | None
) -> None:
    model = shapes.toy(kind)
    work = check(
        model, [f"layers.{i}" for i in range(shapes.BLOCKS)], direct=kind in DIRECT, replayed=replayed
    )
    assert all(linear.method == "gptq" for report in work.reports for linear in report.linears)
    assert not work.warnings, "every linear sees all tokens, once"


_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_SHARING: dict[str, Any] = _TEXT | {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 64,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gemma3n": (
        "Gemma3nTextConfig",
        _SHARING
        | {
            "intermediate_size": [64] * 4,
            "laurel_rank": 16,
            "altup_num_inputs": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        False,
    ),
    "gemma4": ("Gemma4TextConfig", _SHARING | {"per_layer_config": {}}, False),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        _TEXT
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "index_n_heads": 8,
            "index_head_dim": 16,
            "index_topk": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
        False,
    ),
    "cpmant": (
        "CpmAntConfig",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "dim_head": 16,
            "dim_ff": 64,
            "num_hidden_layers": 3,
            "prompt_length": 8,
        },
        False,
    ),
    "bamba": (
        "BambaConfig",
        _TEXT
        | {
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
        True,
    ),
}
"""Name -> config class, its fields, whether the flow is direct."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    class_name, fields, direct = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, 0)
    model.requires_grad_(False)
    check(model, list(find_blocks(model)[1]), direct=direct)


def test_an_interrupt_does_not_let_forwards_run_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward that runs ends at its next block; the blocks themselves may take minutes."""
    model = shapes.toy(shapes.Between)
    names = [f"layers.{i}" for i in range(shapes.BLOCKS)]
    modules, flow = [model.get_submodule(name) for name in names], flow_of(model, names)
    ran: list[nn.Module] = []
    for module in modules:
        module.get_submodule("up").register_forward_hook(lambda module, *_: ran.append(module))
    own = [module.forward for module in modules]
    inside = threading.Event()

    def embedding(module: nn.Module, args: Any, output: Tensor) -> None:
        inside.set()
        time.sleep(0.3)

    model.embed.register_forward_hook(embedding)
    ids = torch.arange(40).reshape(4, 10)
    driven = Driven(model, modules, ids, flow, batch_size=2, input_device=ids.device)

    def interrupted(forward: ModelForward, result: Any = None) -> Any:
        forward.start()
        forward._go.put(None)
        assert inside.wait(10)  # it runs, and the engine's thread hears a signal
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelForward, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        driven.start()
    driven.close()
    assert [module.forward for module in modules] == own
    assert not [thread for thread in threading.enumerate() if isinstance(thread, ModelForward)]
    assert ran == []


def obstacle(kind: type[shapes.Decoder]) -> str:
    return flow_of(shapes.toy(kind), [f"layers.{i}" for i in range(shapes.BLOCKS)]).obstacle


def test_what_has_no_order_is_refused_by_name() -> None:
    assert obstacle(shapes.Twice) == "layers.0 is called 2 times before the last block is called"
    assert obstacle(shapes.Backwards) == "layers.1 is called after layers.2"
    assert (
        obstacle(shapes.Hidden) == "layers.2 reads a tensor of layers.0 that it is not given in its arguments"
    )


def test_a_block_that_text_never_reaches_is_left_out() -> None:
    model = shapes.toy(shapes.Skipping)
    assert flow_of(model, [f"layers.{i}" for i in range(shapes.BLOCKS)]).blocks == ("layers.0", "layers.2")
    check(model, ["layers.0", "layers.2"], direct=True)


def test_a_forward_that_goes_another_way_than_without_data_is_an_error() -> None:
    plain, other = shapes.toy(shapes.Decoder), shapes.toy(shapes.Between)
    flow = flow_of(plain, [f"layers.{i}" for i in range(shapes.BLOCKS)])
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(GptqError, match=r"layers\.1 is not given what the block before it returned"):
        capture(other, list(other.layers), ids, flow, batch_size=1, input_device=torch.device("cpu"))


def test_forwards_end_when_they_are_closed() -> None:
    model = shapes.toy(shapes.SecondValue)
    flow = flow_of(model, [f"layers.{i}" for i in range(shapes.BLOCKS)])
    ids = torch.zeros(3, 8, dtype=torch.long)
    driven = Driven(model, list(model.layers), ids, flow, batch_size=1, input_device=torch.device("cpu"))
    done: list[int] = []
    driven.start(done.append)
    assert done == [1, 2, 3]
    assert count_forwards() == 4, "three samples and the probe"
    driven.close()
    assert count_forwards() == 0
    assert not any("forward" in layer.__dict__ for layer in model.layers)


def test_what_blocks_write_into_stays_one_object_on_its_way_to_another_device() -> None:
    state = UserDict(keys=torch.zeros(2))
    entries = [torch.zeros(2), state]
    holder = SimpleNamespace(values=torch.zeros(2), holder=None)
    holder.holder = holder
    call = BlockCall((entries,), {"holder": holder, "mask": torch.zeros(2)}, "hidden")
    other = call.to(torch.device("meta"))
    assert other.args[0] is entries
    assert entries[1] is state
    assert other.kwargs["holder"] is holder
    devices = {one.device.type for one in tensors_in((other.args, other.kwargs))}
    assert devices == {"meta"}
    assert call.kwargs["mask"].device.type == "cpu"


def test_a_rehearsal_leaves_the_arguments_as_they_were() -> None:
    block = shapes.toy(shapes.SharedState).layers[0]
    hidden, shared = torch.ones(1, 4, shapes.WIDTH), shapes.States(inner=[torch.ones(1, 4, shapes.INNER)])
    call = BlockCall((), {"shared": shared}, "hidden")
    with torch.no_grad():
        rehearsed = call.rehearse(block, hidden)
        assert len(shared["inner"]) == 1
        assert torch.equal(call(block, hidden), rehearsed)
        assert len(shared["inner"]) == 2
        block = shapes.toy(shapes.InPlace).layers[0]
        rehearsed = BlockCall((), {}, writes=True).rehearse(block, hidden)
        assert torch.equal(hidden, torch.ones_like(hidden))
        assert not torch.equal(rehearsed, hidden)
