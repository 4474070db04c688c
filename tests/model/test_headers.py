"""The reader of safetensors headers: it agrees with the library, and checks every claim of a hostile file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gptq_cli.model.headers import HEADER_LIMIT_BYTES, HeaderError, build_header, read_header


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5, dtype=torch.float16),
        "a": torch.arange(7, dtype=torch.int64),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    found = {t.name: t for t in read_header(path)}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        stored = found[name]
        assert stored.shape == tuple(tensor.shape)
        assert stored.dtype == str(tensor.dtype).removeprefix("torch.")
        assert content[stored.begin : stored.end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_our_head_is_read_by_the_library(tmp_path: Path) -> None:
    wanted = {
        "odd": ("uint8", (3,)),
        "w": ("float16", (2, 3)),
        "q": ("int32", (2, 2)),
        "e": ("float32", (0,)),
        "n\u00e9": ("float32", (1,)),
    }
    header, places = build_header(wanted)
    size = max(end for _, end in places.values())
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(range(size - len(header))))
    assert len(header) % 8 == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, (dtype, shape) in wanted.items():
            tensor = file.get_tensor(name)
            assert str(tensor.dtype) == f"torch.{dtype}"
            assert tuple(tensor.shape) == shape
    assert {t.name: (t.begin, t.end) for t in read_header(path)} == places


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"not json", b"", "not valid JSON"),
        (b"[1, 2]", b"", "not a JSON object"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "twice"),
        ({"t": 3}, b"", "the description of tensor t"),
        ({"t": entry("Q4")}, bytes(4), "tensor t has dtype 'Q4'"),
        ({"t": entry(shape=[-1])}, bytes(4), "tensor t has shape [-1]"),
        ({"t": entry(shape=[True])}, bytes(4), "tensor t has shape"),
        ({"t": entry(shape=2)}, bytes(4), "tensor t has shape 2"),
        ({"t": entry(offsets=[0])}, bytes(4), "data_offsets"),
        ({"t": entry(offsets=[-4, 0])}, bytes(4), "data_offsets"),
        ({"t": entry(offsets=[4, 0])}, bytes(4), "tensor t is F32"),
        ({"t": entry(shape=[2**40], offsets=[0, 2**42])}, bytes(4), "truncated"),
        ({"t": entry(shape=[2])}, bytes(4), "tensor t is F32 [2] but has 4 bytes"),
        ({"t": entry()}, bytes(3), "tensor t ends 1 byte after the end of the file: it is truncated"),
        ({"t": entry()}, bytes(5), "1 byte belongs to no tensor, at its end"),
        ({"t": entry(), "u": entry(offsets=[2, 6])}, bytes(6), "overlaps"),
        ({"t": entry(), "u": entry(offsets=[8, 12])}, bytes(12), "belong to no tensor"),
    ],
)
def test_lies_are_named(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    with pytest.raises(HeaderError) as caught:
        read_header(write(tmp_path / "x.safetensors", header, data))
    assert says in str(caught.value)


@pytest.mark.parametrize("length", [HEADER_LIMIT_BYTES + 1, 2**40, 2**64 - 1])
def test_a_huge_head_is_not_allocated(tmp_path: Path, length: int) -> None:
    with pytest.raises(HeaderError, match="claims"):
        read_header(write(tmp_path / "x.safetensors", b"{}", length=length))


def test_a_head_longer_than_the_file(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="truncated"):
        read_header(write(tmp_path / "x.safetensors", b"{}", length=1000))


def test_a_file_of_seven_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(bytes(7))
    with pytest.raises(HeaderError, match="truncated"):
        read_header(tmp_path / "x.safetensors")
