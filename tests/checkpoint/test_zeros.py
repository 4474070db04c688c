"""Zeros in every form in which tools have written them, against writers in plain integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptq_cli.checkpoint.format import PackedFormat, parse_quantization
from gptq_cli.checkpoint.zeros import Zeros, ZerosTally, read_zeros, shift_words, store_zeros

EARLY_THREE = (
    0b00100100100100100100100100100100,
    0b10010010010010010010010010010010,
    0b01001001001001001001001001001001,
)
"""What GPTQModel subtracted from words 0, 1 and 2 of every three before 7.0."""


def written(zeros: list[list[int]], bits: int, how: str) -> torch.Tensor:
    """(G, N) zeros as `qzeros`: each row is one number, written out in 32-bit words, low ones first."""
    rows = []
    for row in zeros:
        fields = [(zero - 1) % 2**bits if how == "gptq" else zero for zero in row]
        number = sum(field << (bits * place) for place, field in enumerate(fields))
        words = [number >> shift & 0xFFFFFFFF for shift in range(0, bits * len(row), 32)]
        if how == "words":
            ones = sum(1 << place for place in range(0, 32, bits))
            taken = EARLY_THREE if bits == 3 else (ones,)
            words = [(word - taken[i % len(taken)]) % 2**32 for i, word in enumerate(words)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def form(bits: int, *, sym: bool, said: str = "gptq", meta: Any = None) -> PackedFormat:
    raw = {"bits": bits, "group_size": 32, "sym": sym, "checkpoint_format": said, "meta": meta}
    return parse_quantization(raw, "config.json").base


def random_zeros(bits: int, columns: int, *, share: float = 0.2) -> list[list[int]]:
    """Some of them 0, which is where borrowing shows."""
    generator = torch.Generator().manual_seed(bits)
    zeros = torch.randint(0, 2**bits, (5, columns), generator=generator)
    zeros[torch.rand(zeros.shape, generator=generator) < share] = 0
    return zeros.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [32, 64, 20])
@pytest.mark.parametrize("how", ["gptq", "gptq_v2", "words"])
def test_asymmetric_zeros_are_read_as_the_config_and_its_writer_say(
    bits: int, columns: int, how: str
) -> None:
    zeros = random_zeros(bits, columns)
    meta = {"quantizer": ["gptqmodel:5.7.0"]} if how == "words" else {"quantizer": "auto-round:0.9"}
    said = form(bits, sym=False, said="gptq_v2" if how == "gptq_v2" else "gptq", meta=meta)
    assert said.zeros == how
    found = read_zeros(written(zeros, bits, how), said, columns)
    assert (found.values.tolist(), found.stored, found.known) == (zeros, how, True)


def test_reading_words_field_by_field_is_something_else() -> None:
    """The fault: neighbours of a 0 are one off."""
    zeros = random_zeros(4, 64)
    found = read_zeros(written(zeros, 4, "words"), form(4, sym=False), 64)
    assert found.values.tolist() != zeros


@pytest.mark.parametrize(
    ("meta", "bits"),
    [
        ({"quantizer": "gptqmodel:7.6.0"}, (2, 4, 8)),
        ({"quantizer": ["gptqmodel:7.0.0"]}, (2, 4, 8)),
        ({"quantizer": ["gptqmodel:6.1.0-dev+cu130"]}, (2, 3, 4, 8)),
        ({"quantizer": ["optimum:1.24.0", "gptqmodel:1.9.0"]}, (2, 3, 4, 8)),
        ({"quantizer": "gptqmodel"}, (2, 4, 8)),
        ({"quantizer": "GPTQModel:v12.1"}, (2, 4, 8)),
        ({"quantizer": "autogptq:0.8.0.dev1"}, (2, 3, 4, 8)),
        ({"quantizer": "intel/auto-round:0.9", "packer": "gptqmodel:8.0"}, (2, 4, 8)),
        ({"quantizer": ["gptq-cli:0.1.0"]}, ()),
        ({"quantizer": None}, ()),
        ({}, ()),
        (None, ()),
        ("gptqmodel:5.0", ()),
    ],
)
def test_who_subtracts_from_whole_words(meta: Any, bits: tuple[int, ...]) -> None:
    assert form(4, sym=False, meta=meta).bits_by_words == bits
    assert form(4, sym=False, said="gptq_v2", meta=meta).zeros == "gptq_v2"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("how", ["gptq", "gptq_v2", "words"])
@pytest.mark.parametrize("meta", [None, {"quantizer": "gptqmodel:5.0.0"}, {"quantizer": "gptqmodel:7.6.0"}])
def test_symmetric_zeros_are_known_whatever_is_said(bits: int, said: str, how: str, meta: Any) -> None:
    middle = [[2 ** (bits - 1)] * 64] * 3
    found = read_zeros(written(middle, bits, how), form(bits, sym=True, said=said, meta=meta), 64)
    assert found.known
    assert found.values.tolist() == middle
    same = bits != 3 and {found.stored, how} == {"gptq", "words"}  # without a 0 these are one
    assert found.stored == how or same


def test_zeros_that_are_nobody_s_are_read_as_the_config_says() -> None:
    middle = [[8] * 15 + [7]]
    found = read_zeros(written(middle, 4, "gptq_v2"), form(4, sym=True), 16)
    assert (found.known, found.stored) == (False, "gptq")
    assert found.values.tolist() == [[9] * 15 + [8]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("how", ["gptq", "gptq_v2"])
def test_storing_is_the_inverse(bits: int, how: str) -> None:
    zeros = random_zeros(bits, 96)
    assert torch.equal(
        store_zeros(torch.tensor(zeros, dtype=torch.uint8), bits, how), written(zeros, bits, how)
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shifting_words_there_and_back(bits: int) -> None:
    zeros = written(random_zeros(bits, 96), bits, "gptq_v2")
    assert torch.equal(shift_words(shift_words(zeros, bits, -1), bits, 1), zeros)


def test_the_tally_tells_only_what_is_not_as_the_config_says() -> None:
    tally = ZerosTally()
    values = torch.zeros(1, 1, dtype=torch.uint8)
    tally.add("gptq", Zeros(values, "gptq", known=True))
    assert list(tally.sentences()) == []
    tally.add("gptq", Zeros(values, "gptq_v2", known=True))
    tally.add("gptq", Zeros(values, "gptq", known=False))
    first, second = tally.sentences()
    assert first.startswith("1 of 3 linears stores its zeros as in gptq_v2, though the config says gptq")
    assert second.startswith("1 of 3 linears has zeros that do not fit symmetric codes")
