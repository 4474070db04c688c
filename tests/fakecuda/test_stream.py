"""Weights streamed to a device: in pinned buffers, one block at a time, and nothing of it left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_cli.devices.host_buffers import HostBuffers
from gptq_cli.engine import block
from gptq_cli.model.shards import ShardFiles
from gptq_cli.model.streamed import StreamedReader
from tests.encoders import STYLES, store_in_few_bits
from tests.fakecuda.devices import Devices
from tests.fakecuda.runs import different, quantize, words_for
from tests.gpu.models import SMALL, save_random

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

Tiny = Callable[..., Path]


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gptq-read")]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("small") / "model", **SMALL)


def test_there_is_one_block_on_the_device(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the work on a block begins: its weights, the hidden states, and nothing of the embedding."""
    held: list[int] = []
    opened = block.open_block

    def noted(*words: Any) -> Any:
        held.append(torch.cuda.memory_allocated(0))
        return opened(*words)

    from gptq_cli.engine import loop

    monkeypatch.setattr(loop, "open_block", noted)
    quantize(small, tmp_path / "out", text, "--device-map", "cuda:0", "--samples", "8", "--seq-len", "32")
    hidden, inner, vocab = (SMALL[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    one = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * inner)
    assert len(held) == 3
    assert all(one < taken < one + 2 * vocab * hidden for taken in held)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt2"])
def test_what_passes_through_main_memory_is_pinned_and_given_back(
    name: str, devices: Devices, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    devices.forget_pinned()
    cpu = quantize(tiny(name), tmp_path / "cpu", text, "--device-map", "cpu")
    assert devices.most_pinned == 0
    card = quantize(tiny(name), tmp_path / "card", text, "--device-map", "cuda:0")
    assert devices.most_pinned == 64 << 20, "one buffer is enough for a small block"
    assert devices.pinned == 0
    assert different(card, cpu) == []
    assert readers() == []


def test_hidden_states_that_rest_in_main_memory_are_pinned(
    devices: Devices, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the plan says where the device is small."""
    from gptq_cli.planning import planner

    cpu = quantize(tiny("llama"), tmp_path / "cpu", text, "--device-map", "cpu")
    monkeypatch.setattr(planner, "WAYS", planner.WAYS[-2:])
    devices.forget_pinned()
    card = quantize(tiny("llama"), tmp_path / "card", text, "--device-map", "cuda:0")
    assert {entry["activations_on_host"] for entry in card.report["schedule"]["blocks"]} == {True}
    assert "hidden states of the calibration text rest in main memory, pinned" in card.report["streaming"]
    assert devices.most_pinned > 64 << 20
    assert devices.pinned == 0
    assert different(card, cpu) == []


def test_without_memory_to_read_ahead_the_run_goes_on(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*words: Any) -> Any:
        raise MemoryError("no memory to pin")

    cpu = quantize(tiny("llama"), tmp_path / "cpu", text, "--device-map", "cpu")
    monkeypatch.setattr(StreamedReader, "read_ahead", short)
    card = quantize(tiny("llama"), tmp_path / "card", text, "--device-map", "cuda:0")
    said = [
        warning for warning in card.report["warnings"] if "blocks are read when their turn comes" in warning
    ]
    assert len(said) == 1
    assert different(card, cpu) == []


def test_what_is_stored_in_few_bits_is_decoded_on_the_device(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptq_cli.model import streamed

    decoded_on: list[str] = []
    decode = streamed.decode

    def noted(coded: Any, codes: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
        decoded_on.append(codes.device.type)
        return decode(coded, codes, *scales)

    coded, plain = store_in_few_bits(tiny("llama", dtype=torch.bfloat16), tmp_path, STYLES["fp8-blocks"])
    expected = quantize(plain, tmp_path / "of-plain", text, "--device-map", "cuda:0")
    monkeypatch.setattr(streamed, "decode", noted)
    found = quantize(coded, tmp_path / "of-coded", text, "--device-map", "cuda:0")
    assert decoded_on.count("cuda") == 21, "seven linears in three blocks"
    assert different(found, expected) == []


def test_a_run_that_goes_on_reads_every_block_once(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished one for the samples to pass through, the others to be worked on."""
    from tests.e2e.commands import gptq

    pack, count = block.pack, iter(range(1000))

    def failing(*words: Any) -> Any:
        if next(count) == 8:
            raise RuntimeError("a defect")
        return pack(*words)

    words = words_for(tiny("llama"), tmp_path / "out", text, "--device-map", "cuda:0")
    with monkeypatch.context() as once:
        once.setattr(block, "pack", failing)
        assert gptq(*words).code == 1
    read: list[str] = []
    real = ShardFiles.read

    def noted(self: ShardFiles, tensor: Any, *rest: Any, **more: Any) -> None:
        if self._where == tiny("llama"):  # not the checkpoint, which is read back in the end
            read.append(tensor.name)
        real(self, tensor, *rest, **more)

    monkeypatch.setattr(ShardFiles, "read", noted)
    again = quantize(tiny("llama"), tmp_path / "out", text, "--device-map", "cuda:0")
    inside = [name for name in read if name.startswith("model.layers.")]
    assert len(inside) == len(set(inside)) == 3 * 9
    monkeypatch.undo()
    whole = quantize(tiny("llama"), tmp_path / "whole", text, "--device-map", "cuda:0")
    assert different(again, whole) == []


def test_the_same_twice(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    first, second = (
        quantize(tiny("mixtral"), tmp_path / str(number), text, "--device-map", "cuda:0")
        for number in range(2)
    )
    assert different(first, second) == []


def test_the_host_goes_on_while_a_block_is_copied(
    devices: Devices, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that was read ahead is on its way when it is opened; what is read next waits for that."""
    on_their_way: list[int] = []
    left: list[int] = []
    copying, read = HostBuffers.copying, ShardFiles.read

    def noted(self: HostBuffers, device: torch.device) -> None:
        on_their_way.append(devices.copies)
        copying(self, device)

    def writing(self: ShardFiles, *words: Any, **more: Any) -> None:
        if threading.current_thread().name.startswith("gptq-read"):
            left.append(devices.copies)
        read(self, *words, **more)

    monkeypatch.setattr(HostBuffers, "copying", noted)
    monkeypatch.setattr(ShardFiles, "read", writing)
    cpu = quantize(tiny("llama"), tmp_path / "cpu", text, "--device-map", "cpu")
    left.clear()
    card = quantize(tiny("llama"), tmp_path / "card", text, "--device-map", "cuda:0")
    assert on_their_way[0] == 0, "the first block is read when its turn comes"
    assert len(on_their_way) == 3
    assert all(on_their_way[1:])
    assert set(left) == {0}
    assert different(card, cpu) == []


def test_buffers_are_not_written_to_before_they_are_copied_from(devices: Devices) -> None:
    cuda, buffers = torch.device("cuda", 1), HostBuffers()
    with torch.accelerator.device_index(1):
        (piece,) = buffers.take(1024)
        piece.fill_(7)
        there = torch.empty(1024, dtype=torch.uint8, device=cuda)
        there.copy_(piece, non_blocking=True)
        assert devices.copies == 1, "nobody has waited"
        buffers.copying(cuda)
        buffers.rewind()
    (again,) = buffers.take(1024)
    assert again.data_ptr() == piece.data_ptr()
    assert devices.copies == 0
    again.fill_(8)
    assert torch.equal(there.cpu(), torch.full((1024,), 7, dtype=torch.uint8))
    del there, piece, again
    buffers.free()
    assert devices.pinned == 0
