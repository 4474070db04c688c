"""Packing: a reader that looks at single bits agrees, and the bytes are those of the golden file."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptq_cli.gptq.packing import PackedTensors, pack, pack_rows, unpack, unpack_rows
from gptq_cli.gptq.quantized import QuantizedLinear
from tests.golden import check_golden

WIDTHS = st.sampled_from([2, 3, 4, 8])


def make(N: int, K: int, G: int, bits: int, seed: int = 0) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    size = -(-K // G)
    return QuantizedLinear(
        codes=torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8),
        scales=torch.rand(N, G, generator=generator).half(),
        zeros=torch.randint(0, 2**bits, (N, G), generator=generator, dtype=torch.uint8),
        g_idx=(torch.arange(K) // size).to(torch.int32),
        loss=0.0,
        rtn_loss=0.0,
        damp_percent=0.05,
        attempts=1,
        method="gptq",
    )


def read_bits(words: list[int], bits: int, count: int) -> list[int]:
    """The stream one bit at a time: bit b is bit b % 32 of word b // 32."""
    stream = [(word >> shift) & 1 for word in words for shift in range(32)]
    return [sum(stream[i * bits + j] << j for j in range(bits)) for i in range(count)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(WIDTHS, st.integers(1, 130), st.integers(1, 9), st.integers(0, 9))
def test_round_trip_and_single_bits(bits: int, R: int, C: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (R, C), generator=generator, dtype=torch.uint8)
    words = pack_rows(values, bits)
    assert words.dtype == torch.int32
    assert words.shape == (-(-R * bits // 32), C)
    assert torch.equal(unpack_rows(words, bits, R), values)
    for c in range(C):
        assert read_bits(words[:, c].tolist(), bits, R) == values[:, c].tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    WIDTHS, st.integers(1, 70), st.integers(1, 70), st.integers(1, 5), st.sampled_from(["gptq", "gptq_v2"])
)
def test_a_linear_survives_the_checkpoint(bits: int, N: int, K: int, G: int, layout: str) -> None:
    q = make(N, K, min(G, K), bits, seed=N * K)
    packed = pack(q, bits, layout)
    assert packed.qweight.shape == (-(-K * bits // 32), N)
    assert packed.qzeros.shape == (q.zeros.shape[1], -(-N * bits // 32))
    assert packed.scales.shape == (q.scales.shape[1], N)
    assert packed.scales.dtype == torch.float16
    assert all(t.is_contiguous() for t in (packed.qweight, packed.qzeros, packed.scales, packed.g_idx))
    codes, zeros = unpack(packed, bits, layout, K, N)
    assert torch.equal(codes, q.codes)
    assert torch.equal(zeros, q.zeros)
    assert torch.equal(packed.scales.T, q.scales)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v1_stores_one_less(bits: int) -> None:
    """The first zero is 0: it becomes the largest code, which a v1 reader turns back modulo 2^bits."""
    q = make(37, 64, 2, bits)
    q.zeros[0, 0] = 0
    v1, v2 = pack(q, bits, "gptq"), pack(q, bits, "gptq_v2")
    for group in range(2):
        stored = read_bits(v1.qzeros[group].tolist(), bits, 37)
        assert stored == [(int(z) - 1) % 2**bits for z in q.zeros[:, group]]
        assert read_bits(v2.qzeros[group].tolist(), bits, 37) == q.zeros[:, group].tolist()
    assert torch.equal(v1.qweight, v2.qweight)


def test_symmetric_four_bit_zeros_are_the_famous_sevens() -> None:
    q = make(8, 32, 1, 4)
    q.zeros[:] = 8
    assert pack(q, 4, "gptq").qzeros.tolist() == [[0x77777777]]


def test_words_that_are_missing() -> None:
    q = make(8, 64, 1, 4)
    packed = pack(q, 4, "gptq")
    short = PackedTensors(
        qweight=packed.qweight[:-1], qzeros=packed.qzeros, scales=packed.scales, g_idx=packed.g_idx
    )
    with pytest.raises(ValueError, match="7 words; 64 codes of 4 bits fill 8"):
        unpack(short, 4, "gptq", 64, 8)
    with pytest.raises(ValueError, match="gptq_v3"):
        pack(q, 4, "gptq_v3")


def test_golden_bytes() -> None:
    """What is on disk must not change from one release to the next."""

    def text(words: Tensor) -> list[str]:
        return [" ".join(f"{word & 0xFFFFFFFF:08x}" for word in row) for row in words.tolist()]

    document = {}
    for bits in (2, 3, 4, 8):
        q = make(5, 40, 2, bits)
        q.codes[:] = ((7 * torch.arange(40)[None] + 3 * torch.arange(5)[:, None]) % 2**bits).to(torch.uint8)
        q.zeros[:] = ((torch.arange(5)[:, None] + 2 * torch.arange(2)[None]) % 2**bits).to(torch.uint8)
        v1, v2 = pack(q, bits, "gptq"), pack(q, bits, "gptq_v2")
        document[f"{bits} bits"] = {
            "qweight": text(v1.qweight),
            "qzeros gptq": text(v1.qzeros),
            "qzeros gptq_v2": text(v2.qzeros),
        }
    check_golden("packing.json", json.dumps(document, indent=1) + "\n")
