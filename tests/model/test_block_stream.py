"""Blocks that are read when their turn comes: the same weights, one block at a time, the next one ahead."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import ModelError, NonFinite, SourceChanged
from gptq_cli.model import streamed
from gptq_cli.model.block_stream import BlockStream
from gptq_cli.model.conversion import Conversion, tied_groups
from gptq_cli.model.selection import select_linears
from gptq_cli.model.shards import ShardFiles
from gptq_cli.model.streamed import StreamedReader
from gptq_cli.model.weights import load_resident
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement, PlacementEntry
from tests.checkpoint.unquantized import opened
from tests.conftest import TinyFactory
from tests.encoders import STYLES, store_in_few_bits
from tests.tiny import randomize

ON_CPU = Placement((PlacementEntry("", CPU, 0, True),), CPU, "a test")


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gptq-read")]


@pytest.mark.parametrize("reads_ahead", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "qwen3_moe", "mixtral", "qwen3_vl"])
def test_one_block_at_a_time(name: str, reads_ahead: bool, tiny: TinyFactory) -> None:
    skeleton = opened(tiny(name))
    resident = load_resident(skeleton, ON_CPU)
    expected = resident.state_dict()
    with BlockStream(skeleton, ON_CPU, reads_ahead=reads_ahead) as stream:
        assert not stream.model.training
        for block in skeleton.blocks:
            module = stream.model.get_submodule(block)
            assert all(parameter.is_meta for parameter in module.parameters())
            with stream.on_device(block):
                for key, value in module.state_dict().items():
                    assert torch.equal(value, expected[f"{block}.{key}"]), key
                next(module.parameters()).data.zero_()
            assert all(parameter.is_meta for parameter in module.parameters())
        with stream.on_device(skeleton.blocks[0]):
            first = next(stream.model.get_submodule(skeleton.blocks[0]).parameters())
            assert first.any(), "read again, as it is in the files"
        for key, value in stream.model.state_dict().items():
            if not value.is_meta:
                assert torch.equal(value, expected[key]), key
    assert all(parameter.is_meta for parameter in skeleton.model.parameters()), "the skeleton stays one"
    assert readers() == []


def empty(stream: BlockStream) -> set[str]:
    """The modules outside the blocks without their weights."""
    blocks = tuple(f"{block}." for block in stream.blocks)
    names = {name for name, tensor in stream.model.state_dict().items() if tensor.is_meta}
    return {name.rpartition(".")[0] for name in names if not name.startswith(blocks)}


def test_what_no_forward_on_text_calls_stays_in_the_files(tiny: TinyFactory) -> None:
    with BlockStream(opened(tiny("llama")), ON_CPU) as stream:
        assert empty(stream) == {"lm_head"}
        stream.release()
        assert empty(stream) == {"lm_head", "model.embed_tokens", "model.norm"}
    with BlockStream(opened(tiny("gpt2")), ON_CPU) as stream:
        assert empty(stream) == set(), "the head is the embedding"
    with BlockStream(opened(tiny("qwen3_vl")), ON_CPU) as stream:
        assert {name.partition(".visual.")[0] for name in empty(stream)} == {"model", "lm_head"}


def test_what_a_quantized_head_needs_stays(tiny: TinyFactory) -> None:
    skeleton = select_linears(opened(tiny("llama")), QuantizeConfig(quantize_head=True))
    with BlockStream(skeleton, ON_CPU) as stream:
        stream.release()
        assert empty(stream) == set()


def damaged(path: Path, to: Path, name: str) -> Path:
    """A copy with one NaN in a tensor."""
    copied = Path(shutil.copytree(path, to))
    tensors = load_file(copied / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(
    name: str, tiny: TinyFactory, tmp_path: Path
) -> None:
    skeleton = opened(damaged(tiny("llama"), tmp_path / "model", name))
    with pytest.raises(NonFinite, match=f"{name} holds 1 value that is"), BlockStream(skeleton, ON_CPU):
        pass


def test_the_next_block_is_read_while_one_is_worked_on(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = opened(tiny("llama"))
    read: list[tuple[bool, set[str]]] = []
    real = StreamedReader.read_ahead

    def noted(self: StreamedReader, names: Iterable[str], *rest: Any) -> Any:
        names = list(names)
        read.append((threading.current_thread() is threading.main_thread(), {n[:14] for n in names}))
        return real(self, names, *rest)

    monkeypatch.setattr(StreamedReader, "read_ahead", noted)
    with BlockStream(skeleton, ON_CPU, order=skeleton.blocks[:2]) as stream:
        with stream.on_device("model.layers.0"):
            assert stream.model.get_submodule("model.layers.1.mlp.up_proj").weight.is_meta
        with stream.on_device("model.layers.1"):
            pass
    assert read == [(False, {"model.layers.1"})], "the third block is not among those to be worked on"


def stalled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reading ahead stops before its first byte, until the event is set."""
    event, real = threading.Event(), ShardFiles.read

    def waiting(self: ShardFiles, *words: Any, **more: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            event.wait(10)
        real(self, *words, **more)

    monkeypatch.setattr(ShardFiles, "read", waiting)
    return event


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_thread_is_left_behind(
    error: type[BaseException], tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = stalled(monkeypatch)
    stream = BlockStream(opened(tiny("llama")), ON_CPU)
    with pytest.raises(error), stream, stream.on_device("model.layers.0"):
        assert readers() == ["gptq-read model.layers.1"]
        event.set()
        raise error
    assert readers() == []
    assert all(tensor.is_meta for tensor in stream.model.get_submodule("model.layers").parameters())


def test_another_block_than_the_next_one(tiny: TinyFactory) -> None:
    skeleton = opened(tiny("llama"))
    expected = load_resident(skeleton, ON_CPU).state_dict()
    with BlockStream(skeleton, ON_CPU) as stream:
        for block in ("model.layers.0", "model.layers.2", "model.layers.1"):
            with stream.on_device(block):
                for key, value in stream.model.get_submodule(block).state_dict().items():
                    assert torch.equal(value, expected[f"{block}.{key}"])


def test_without_memory_to_read_ahead(tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    real = streamed._memory

    def short(size_bytes: int) -> list[Tensor]:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        return real(size_bytes)

    monkeypatch.setattr(streamed, "_memory", short)
    said: list[str] = []
    skeleton = opened(tiny("llama"))
    expected = load_resident(skeleton, ON_CPU).state_dict()
    with BlockStream(skeleton, ON_CPU, tell=said.append) as stream:
        for block in skeleton.blocks:
            with stream.on_device(block):
                for key, value in stream.model.get_submodule(block).state_dict().items():
                    assert torch.equal(value, expected[f"{block}.{key}"])
    assert said == ["no memory to read model.layers.1 ahead: blocks are read when their turn comes"]


def test_without_memory_for_the_block_itself(tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(size_bytes: int) -> list[Tensor]:
        raise MemoryError

    with BlockStream(opened(tiny("llama")), ON_CPU) as stream:
        monkeypatch.setattr(streamed, "_memory", short)
        with pytest.raises(MemoryError), stream.on_device("model.layers.0"):
            pass


@pytest.mark.parametrize("ahead", [True, False])
def test_a_shard_that_changes_is_noticed(ahead: bool, tiny: TinyFactory, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("llama", shards=3), tmp_path / "model"))
    skeleton = opened(model)
    noticed = pytest.raises(SourceChanged, match="changed during the run")
    with noticed, BlockStream(skeleton, ON_CPU, reads_ahead=ahead) as stream:
        for shard in model.glob("*.safetensors"):
            os.utime(shard, ns=(1, 1))
        with pytest.raises(SourceChanged):
            for block in skeleton.blocks:
                with stream.on_device(block):
                    pass
        assert readers() == []


@pytest.mark.parametrize("style", ["fp8-blocks", next(name for name in STYLES if "nvfp4" in name)])
def test_weights_in_few_bits(style: str, tiny: TinyFactory, tmp_path: Path) -> None:
    coded, decoded = store_in_few_bits(tiny("llama", dtype=torch.bfloat16), tmp_path, STYLES[style])
    expected = load_resident(opened(decoded), ON_CPU).state_dict()
    skeleton = opened(coded)
    with BlockStream(skeleton, ON_CPU) as stream:
        for block in skeleton.blocks:
            with stream.on_device(block):
                for key, value in stream.model.get_submodule(block).state_dict().items():
                    assert torch.equal(value, expected[f"{block}.{key}"]), key


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_are_put_together_one_by_one(
    name: str, tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Transformers' rule does it with all of them at once."""
    skeleton = opened(tiny(name))
    conversion = Conversion(skeleton.model)
    merged = {key: origin for key, origin in skeleton.keys.origins.items() if "experts" in key}
    assert merged
    with StreamedReader(skeleton.files.directory, skeleton.files.tensors) as reader:
        for target, origin in merged.items():
            parts = conversion.parts(origin)
            assert parts is not None
            sources = {source: reader.get(source) for source in origin.sources}
            whole = conversion.convert(origin, sources)[target]
            for source, part in parts.items():
                assert torch.equal(whole[part], sources[source])
    plain = skeleton.keys.origins["model.norm.weight"]
    assert conversion.parts(plain) is None


ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "made from random numbers in the constructor": (
        "DiffLlamaConfig",
        {"num_hidden_layers": 2, "num_key_value_heads": 2},
    ),
    "one set of weights for two blocks": (
        "ZambaConfig",
        {
            "num_hidden_layers": 6,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2,
            "mamba_d_state": 8,
            "n_mamba_heads": 2,
            "mamba_dt_rank": 8,
            "attention_head_dim": 32,
        },
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_parameters_of_every_kind_are_read(name: str, tmp_path: Path) -> None:
    class_name, fields = ODD[name]
    common = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = getattr(transformers, class_name)(**common | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 1)
    model.save_pretrained(tmp_path)
    skeleton = opened(tmp_path)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    expected = load_resident(skeleton, ON_CPU).state_dict()
    with BlockStream(skeleton, ON_CPU) as stream:
        for block in (*skeleton.blocks, *skeleton.blocks):
            with stream.on_device(block):
                for key, value in stream.model.get_submodule(block).state_dict().items():
                    assert torch.equal(value, expected[f"{block}.{key}"]), f"{block}.{key}"
            assert all(parameter.is_meta for parameter in stream.model.get_submodule(block).parameters())
        assert tied_groups(stream.model) == skeleton.tied


def test_a_stream_names_what_it_cannot_read(tiny: TinyFactory, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    skeleton = opened(model)
    with (model / "model.safetensors").open("rb+") as file:
        file.truncate((model / "model.safetensors").stat().st_size - 64)
    with pytest.raises(
        SourceChanged, match=r"model\.safetensors in .* changed .*: it had [\d,]+ bytes and now has"
    ):
        BlockStream(skeleton, ON_CPU).__enter__()
    unnoted = replace(skeleton, files=replace(skeleton.files, stamps=()))
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: .*truncated"):
        BlockStream(unnoted, ON_CPU).__enter__()
