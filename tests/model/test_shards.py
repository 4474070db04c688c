"""Bytes from files, or from the rank that sees them: the same model either way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from gptq_cli.config import ModelRef
from gptq_cli.errors import CheckpointError
from gptq_cli.model import block_stream
from gptq_cli.model.block_stream import BlockStream
from gptq_cli.model.find import find_model
from gptq_cli.model.shards import ReceivedShards, SentShards, ShardFiles
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.source_files import defining_files
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement, PlacementEntry
from gptq_cli.ranks.channel import Channel
from tests.checkpoint.unquantized import opened
from tests.conftest import TinyFactory

ON_CPU = Placement((PlacementEntry("", CPU, 0, True),), CPU, "a test")


@dataclass
class Tape:
    """A channel whose other end comes later: what one stream sends, another one receives in its turn."""

    pieces: deque[Tensor] = field(default_factory=deque)
    ready: bool = True
    """What the other rank says when asked."""
    sends: bool = True

    def carry(self, piece: Tensor) -> None:
        if self.sends:
            self.pieces.append(piece.clone())
        else:
            piece.copy_(self.pieces.popleft())

    def agreed(self, ready: bool) -> bool:
        return ready and self.ready


def through(stream: BlockStream) -> dict[str, Tensor]:
    """Every tensor that a run over all blocks has in memory."""
    seen: dict[str, Tensor] = {}
    with stream:
        for block in stream.blocks:
            with stream.on_device(block):
                state = stream.model.get_submodule(block).state_dict()
                seen |= {f"{block}.{key}": value.clone() for key, value in state.items()}
        return seen | {key: value for key, value in stream.model.state_dict().items() if not value.is_meta}


def sent(skeleton: Skeleton, tape: Tape, **options: Any) -> BlockStream:
    files = skeleton.files
    shards = SentShards(ShardFiles(files.directory, files.stamps), cast(Channel, tape))
    return BlockStream(skeleton, ON_CPU, shards=shards, **options)


def received(skeleton: Skeleton, tape: Tape, **options: Any) -> BlockStream:
    """A stream of a model whose files are not there."""
    blind = replace(skeleton, files=replace(skeleton.files, directory=Path("/nowhere"), stamps=()))
    tape.sends = False
    return BlockStream(
        blind, ON_CPU, shards=ReceivedShards(cast(Channel, tape)), looks_at_all=False, **options
    )


@pytest.mark.parametrize("reads_ahead", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_vl"])
def test_what_is_received_is_what_is_in_the_files(name: str, reads_ahead: bool, tiny: TinyFactory) -> None:
    skeleton, tape = opened(tiny(name)), Tape()
    expected = through(sent(skeleton, tape, reads_ahead=reads_ahead))
    there = through(received(skeleton, tape, reads_ahead=reads_ahead))
    assert not tape.pieces, "all that was sent was taken"
    assert there.keys() == expected.keys()
    assert all(torch.equal(there[key], value) for key, value in expected.items())


def test_what_nothing_is_computed_with_is_not_sent(tiny: TinyFactory) -> None:
    skeleton, tape = opened(tiny("llama")), Tape()
    through(sent(skeleton, tape))
    total = sum(piece.numel() for piece in tape.pieces)
    head = next(tensor for tensor in skeleton.files.tensors if tensor.name == "lm_head.weight")
    assert total == skeleton.files.size_bytes - head.size_bytes


def test_no_rank_reads_ahead_where_one_has_no_memory_for_it(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    class Noted(block_stream.ReadAhead[Any]):
        def __init__(self, name: str, read: Callable[[Callable[[], None]], Any]) -> None:
            begun.append(name)
            super().__init__(name, read)

    monkeypatch.setattr(block_stream, "ReadAhead", Noted)
    skeleton = opened(tiny("llama"))
    through(sent(skeleton, Tape(ready=False)))
    assert begun == []
    through(sent(skeleton, Tape()))
    assert begun == ["model.layers.1", "model.layers.2"]


def test_what_others_wait_for_is_read_to_its_end(tiny: TinyFactory) -> None:
    skeleton, tape = opened(tiny("llama")), Tape()
    with sent(skeleton, tape) as stream:
        before = len(tape.pieces)
        with stream.on_device("model.layers.0"):
            pass  # the second block is read ahead meanwhile, and not used
    blocks = [
        sum(tensor.name.startswith(f"{name}.") for tensor in skeleton.files.tensors)
        for name in skeleton.blocks
    ]
    assert len(tape.pieces) - before == blocks[0] + blocks[1]


def test_a_tensor_that_a_shard_does_not_hold(tiny: TinyFactory) -> None:
    directory = tiny("llama")
    tensor = replace(find_model(ModelRef(model=str(directory))).tensors[0], name="other")
    shards = ShardFiles(directory)
    with pytest.raises(CheckpointError, match=r"tensor other in model\.safetensors cannot be read"):
        shards.stored(tensor)
    shards.close()


def test_what_a_model_without_weights_is_built_from(tmp_path: Path) -> None:
    for name in (
        "config.json",
        "tokenizer.json",
        "modeling_own.py",
        "model.safetensors",
        "quant_config.json",
    ):
        (tmp_path / name).touch()
    assert defining_files(tmp_path, code=False) == ("config.json", "quant_config.json")
    assert defining_files(tmp_path, code=True) == ("config.json", "modeling_own.py", "quant_config.json")
