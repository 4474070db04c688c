"""From codes to the int32 words of the checkpoint, and back.

    qweight  int32 [ceil(K·bits/32), N]       codes packed along K, low bits first
    qzeros   int32 [groups, ceil(N·bits/32)]  zeros packed along N, low bits first
    scales   fp16  [groups, N]
    g_idx    int32 [K]

A column of codes is one stream of bits: code k begins at bit k·bits of the stream, bit b of the stream is bit
b % 32 of word b // 32. With 2, 4 and 8 bits no code crosses a word border. With 3 bits 32 codes fill 3 words,
and codes 10 and 21 of every 32 cross a border. Where K or N does not fill the last word, the rest is 0.

Format "gptq" (v1) stores zero - 1 modulo 2^bits, as AutoGPTQ did; "gptq_v2" stores the zero itself. A v1
reader that adds 1 without the modulo reads a zero of 0 as 2^bits, which is why asymmetric codes go out as v2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.gptq.quantized import QuantizedLinear

V1, V2 = "gptq", "gptq_v2"
_WORD = 32
_CACHED_WORDS, _DEVICE_WORDS = 1 << 17, 1 << 24
"""Words processed at once. On a CPU half a MiB, so that repeated passes over them stay in a core's cache;
elsewhere enough that launching the passes costs little."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedTensors:
    """The tensors of one linear as the checkpoint holds them."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def _block(bits: int) -> tuple[int, int]:
    """The smallest number of codes that exactly fills words: (codes, words)."""
    return (_WORD, bits) if _WORD % bits else (_WORD // bits, 1)


def _words_at_once(values: Tensor) -> int:
    return _CACHED_WORDS if values.device.type == "cpu" else _DEVICE_WORDS


def pack_rows(
    values: Tensor,  # uint8 (R, C), each below 2^bits
    bits: int,
) -> Tensor:  # int32 (ceil(R·bits/32), C)
    """Pack along the first dimension."""
    R, C = values.shape
    per, words = _block(bits)
    blocks = -(-R // per)
    out = torch.zeros(blocks, words, C, dtype=torch.int32, device=values.device)
    step = max(1, _words_at_once(values) // (words * C))
    for first in range(0, blocks, step):
        here, there = values[first * per : (first + step) * per], out[first : first + step]
        for i in range(per):
            column = here[i::per].to(torch.int32)
            word, shift = divmod(i * bits, _WORD)
            into = there[: column.shape[0]]
            if shift + bits > _WORD:
                into[:, word + 1] |= column >> (_WORD - shift)
            into[:, word] |= column << shift
    return out.view(blocks * words, C)[: -(-R * bits // _WORD)].contiguous()


def unpack_rows(
    packed: Tensor,  # int32 (ceil(R·bits/32), C)
    bits: int,
    R: int,
) -> Tensor:  # uint8 (R, C)
    """The inverse of `pack_rows`. Raises `ValueError` when the words do not hold R codes."""
    needed = -(-R * bits // _WORD)
    if packed.shape[0] != needed:
        raise ValueError(f"{packed.shape[0]} words; {R} codes of {bits} bits fill {needed}")
    per, words = _block(bits)
    blocks = -(-R // per)
    if packed.shape[0] < blocks * words:
        filler = packed.new_zeros(blocks * words - packed.shape[0], packed.shape[1])
        packed = torch.cat([packed, filler])
    view = packed.view(blocks, words, -1)
    out = torch.empty(R, packed.shape[1], dtype=torch.uint8, device=packed.device)
    mask = 2**bits - 1
    step = max(1, _words_at_once(packed) // (words * max(1, packed.shape[1])))
    for first in range(0, blocks, step):
        here, there = view[first : first + step], out[first * per : (first + step) * per]
        for i in range(per):
            word, shift = divmod(i * bits, _WORD)
            into = there[i::per]
            value = here[: into.shape[0], word] >> shift
            if shift + bits > _WORD:
                # an arithmetic shift fills with the sign: keep the bits that belong to this word
                value &= 2 ** (_WORD - shift) - 1
                value |= here[: into.shape[0], word + 1] << (_WORD - shift)
            into.copy_(value.bitwise_and_(mask))
    return out


def pack(q: QuantizedLinear, bits: int, checkpoint_format: str) -> PackedTensors:
    """The tensors of the checkpoint for a quantized linear."""
    zeros = zeros_to_fields(q.zeros.T, bits, checkpoint_format)  # (groups, N)
    return PackedTensors(
        qweight=pack_rows(q.codes.T.contiguous(), bits),
        qzeros=pack_rows(zeros.T, bits).T.contiguous(),
        scales=q.scales.T.to(torch.float16).contiguous(),
        g_idx=q.g_idx.to(torch.int32),
    )


def unpack(
    packed: PackedTensors, bits: int, checkpoint_format: str, in_features: int, out_features: int
) -> tuple[Tensor, Tensor]:  # codes uint8 (N, K), zeros uint8 (N, groups)
    """The inverse of `pack`; v1 zeros are read modulo 2^bits. Raises `ValueError` when words are missing."""
    codes = unpack_rows(packed.qweight, bits, in_features).T.contiguous()
    zeros = unpack_rows(packed.qzeros.T.contiguous(), bits, out_features)
    return codes, fields_to_zeros(zeros, bits, checkpoint_format)


def zeros_to_fields(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """What `qzeros` hold, uint8, for uint8 zeros: v1 ("gptq") zero - 1 modulo 2^bits, v2 the zero itself."""
    return (zeros - 1).bitwise_and(2**bits - 1) if _is_v1(checkpoint_format) else zeros


def fields_to_zeros(fields: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """The inverse of `zeros_to_fields`; uint8 wraps at 256, as 8 bits should."""
    return (fields + 1).bitwise_and(2**bits - 1) if _is_v1(checkpoint_format) else fields


def _is_v1(checkpoint_format: str) -> bool:
    if checkpoint_format not in (V1, V2):
        raise ValueError(f"checkpoint_format is {checkpoint_format!r}; allowed: {V1}, {V2}")
    return checkpoint_format == V1
