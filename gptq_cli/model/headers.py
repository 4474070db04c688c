"""The header of a safetensors file, read without reading a weight and without trusting a byte.

    8 bytes   N, little endian
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, …}
    the rest  the tensors' bytes; offsets count from here

In an untrusted file each of these numbers may be wrong, so each is checked against the size of the file
before it is used: the header's length against a limit, every range against the data, every range's length
against dtype and shape, the ranges against each other. No number in the file decides how much memory is
allocated. (https://github.com/huggingface/safetensors#format)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gptq_cli.model.source_files import open_regular
from gptq_cli.wording import as_json, number_of

HEADER_LIMIT_BYTES = 100_000_000
"""The library's own limit; 70B-parameter models need about a tenth of a megabyte."""
VALUES_LIMIT = 2_000_000
"""Values in the JSON text of a header or an index: parsed, each takes a hundred bytes or more. The headers of
the largest models, with a hundred thousand experts, hold half as many in all."""
NAME_LIMIT = 1024
"""Characters of a tensor's name."""
_DIMENSIONS_LIMIT = 64
_LARGEST = 1 << 63
_SHOWN = 80

DTYPES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "BOOL": ("bool", 8),
        "U8": ("uint8", 8),
        "I8": ("int8", 8),
        "F8_E4M3": ("float8_e4m3fn", 8),
        "F8_E5M2": ("float8_e5m2", 8),
        "F8_E8M0": ("float8_e8m0fnu", 8),
        "F4": ("float4_e2m1fn_x2", 4),
        "U16": ("uint16", 16),
        "I16": ("int16", 16),
        "F16": ("float16", 16),
        "BF16": ("bfloat16", 16),
        "U32": ("uint32", 32),
        "I32": ("int32", 32),
        "F32": ("float32", 32),
        "U64": ("uint64", 64),
        "I64": ("int64", 64),
        "F64": ("float64", 64),
        "C64": ("complex64", 64),
    }
)
"""safetensors' dtype -> torch's name, bits per element."""

TORCH_TO_SAFETENSORS: Mapping[str, str] = MappingProxyType({name: key for key, (name, _) in DTYPES.items()})


class HeaderError(Exception):
    """The file is not a valid safetensors file; the message says where it is wrong. Caught inside
    `gptq_cli.model`."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: `begin` and `end` are positions in the whole file."""

    name: str
    dtype: str
    """torch's name: "bfloat16"."""
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Stored bytes."""
        return self.end - self.begin


def read_header(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of one safetensors file in the order of their bytes. Raises `HeaderError` and `OSError`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise HeaderError(
                f"{number_of(size, 'byte', 'is', 'are')} too few for a safetensors file: it is truncated"
            )
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_LIMIT_BYTES:
            raise HeaderError(
                f"its header claims {length} bytes; allowed: {HEADER_LIMIT_BYTES}: "
                "it is not a safetensors file"
            )
        if 8 + length > size:
            raise HeaderError(
                f"its header claims {number_of(length, 'byte')}, the file has {size:,}: it is truncated"
            )
        text = file.read(length)
    return parse_header(text, data_start=8 + length, file_bytes=size)


def header_digest(path: Path) -> str:
    """SHA-256 of a file's first bytes up to the first tensor, in hex; "" where they cannot be read."""
    try:
        with open_regular(path) as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > HEADER_LIMIT_BYTES:
                return ""
            return hashlib.sha256(start + file.read(length)).hexdigest()
    except OSError:
        return ""


def parse_header(text: bytes, *, data_start: int, file_bytes: int) -> tuple[StoredTensor, ...]:
    """Parse and check the JSON header of a file of `file_bytes` whose tensors begin at `data_start`."""
    if (values := count_values(text)) > VALUES_LIMIT:
        raise HeaderError(f"its header holds about {values} values; allowed: {VALUES_LIMIT}: it is corrupt")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise HeaderError(f"its header is not valid JSON ({error}): it is corrupt") from error
    if not isinstance(header, dict):
        raise HeaderError("its header is not a JSON object: it is corrupt")
    header.pop("__metadata__", None)
    tensors = sorted(
        (_parse_entry(name, entry, data_start) for name, entry in header.items()),
        key=lambda t: (t.begin, t.end),
    )
    position = data_start
    for tensor in tensors:
        if tensor.end > file_bytes:
            missing = number_of(tensor.end - file_bytes, "byte")
            raise HeaderError(
                f"tensor {tensor.name} ends {missing} after the end of the file: it is truncated"
            )
        if tensor.begin < position:
            raise HeaderError(f"tensor {tensor.name} overlaps its neighbour: it is corrupt")
        if tensor.begin > position:
            raise HeaderError(
                f"{number_of(tensor.begin - position, 'byte', 'belongs', 'belong')} to no tensor, "
                f"before tensor {tensor.name}"
            )
        position = tensor.end
    if position != file_bytes:
        loose = number_of(file_bytes - position, "byte", "belongs", "belong")
        raise HeaderError(f"{loose} to no tensor, at its end: it is corrupt")
    return tuple(tensors)


def count_values(text: bytes) -> int:
    """An upper bound on the values in a JSON text, found without parsing it."""
    return 1 + text.count(b",") + text.count(b"[") + text.count(b"{")


def brief(value: object) -> str:
    """`value` for a message, shortened: in an untrusted file it may be as long as the file."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LARGEST:
        return "a number of more than 63 bits"
    if isinstance(value, list):
        rest = f", … ({len(value)} in all)" if len(value) > 8 else ""
        return f"[{', '.join(brief(item) for item in value[:8])}{rest}]"
    if isinstance(value, dict):
        return "an object"
    text = repr(value[:_SHOWN]) if isinstance(value, str) else as_json(value)
    return f"{text}…" if isinstance(value, str) and len(value) > _SHOWN else text


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{brief(twice)} appears twice")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _elements(shape: list[int]) -> int:
    """The product of the sizes; where it exceeds the size of any file, some number that does too."""
    if 0 in shape:
        return 0
    product = 1
    for size in shape:
        product *= size
        if product >= _LARGEST:
            return product
    return product


def _parse_entry(name: str, entry: object, data_start: int) -> StoredTensor:
    if len(name) > NAME_LIMIT:
        raise HeaderError(f"tensor {brief(name)} has a name of {len(name)} characters; allowed: {NAME_LIMIT}")
    if not isinstance(entry, dict):
        raise HeaderError(f"the description of tensor {name} is not a JSON object: it is corrupt")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"tensor {name} has dtype {brief(dtype)}; allowed: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise HeaderError(f"tensor {name} has shape {brief(shape)}; allowed: a list of sizes of at least 0")
    if len(shape) > _DIMENSIONS_LIMIT:
        raise HeaderError(f"tensor {name} has {len(shape)} dimensions; allowed: {_DIMENSIONS_LIMIT}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise HeaderError(f"tensor {name} has data_offsets {brief(offsets)}; allowed: [begin, end]")
    begin, end = offsets
    torch_name, bits = DTYPES[dtype]
    if (end - begin) * 8 != _elements(shape) * bits:
        size = number_of(end - begin, "byte")
        raise HeaderError(f"tensor {name} is {dtype} {shape} but has {size}: it is corrupt")
    return StoredTensor(name, torch_name, tuple(shape), data_start + begin, data_start + end)


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file with these tensors (name -> torch dtype, shape), and every tensor's range
    in the file.

    Tensors are sorted by descending width of their dtype, then by name, as in the library: each is aligned
    to its element size.
    """
    order = sorted(tensors, key=lambda name: (-DTYPES[TORCH_TO_SAFETENSORS[tensors[name][0]]][1], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, tuple[int, int]] = {}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        key = TORCH_TO_SAFETENSORS[dtype]
        end = position + math.prod(shape) * DTYPES[key][1] // 8
        header[name] = {"dtype": key, "shape": list(shape), "data_offsets": [position, end]}
        places[name] = (position, end)
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    shifted = {name: (start + begin, start + end) for name, (begin, end) in places.items()}
    return len(text).to_bytes(8, "little") + text, shifted
