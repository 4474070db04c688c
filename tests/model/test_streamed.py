"""Tensors are read, not mapped: the same values, memory of their own, damage named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptq_cli.errors import CheckpointError
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.source import scan_directory
from gptq_cli.model.streamed import StreamedReader

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.arange(7, dtype=torch.int32),
    "c": torch.randn(2, 2, 2).bfloat16(),
    "odd": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.zeros(0, 5),
}


@pytest.fixture
def reader(tmp_path: Path) -> StreamedReader:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return StreamedReader(tmp_path, scan_directory(tmp_path).tensors)


def test_the_same_values(reader: StreamedReader) -> None:
    with reader:
        for name, tensor in TENSORS.items():
            found = reader.get(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found, tensor)
            assert name in reader


def test_the_file_may_change_afterwards(reader: StreamedReader, tmp_path: Path) -> None:
    with reader:
        found = reader.get("a")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(found, TENSORS["a"])


def test_unknown_tensors(reader: StreamedReader) -> None:
    with reader, pytest.raises(CheckpointError, match="has no tensor z"):
        reader.get("z")


def test_a_file_that_shrank_since_it_was_listed(reader: StreamedReader, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with reader, pytest.raises(CheckpointError, match=r"model\.safetensors"):
        reader.get("a")


def test_a_file_that_shrinks_while_it_is_read(reader: StreamedReader, tmp_path: Path) -> None:
    with reader:
        reader.get("b")
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(CheckpointError, match=r"of which the file holds \d+"):
            for name in TENSORS:
                reader.get(name)


def test_a_dtype_that_torch_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    info = TensorInfo("a", (2,), "float32", 8, "model.safetensors")
    monkeypatch.delattr(torch, "float32")
    with StreamedReader(tmp_path, [info]) as reader, pytest.raises(CheckpointError, match="does not know"):
        reader.get("a")
