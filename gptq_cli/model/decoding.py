"""Weights in few bits decoded to bfloat16, the maths of each format written out.

A weight in few bits is stored as codes and scales. Each code stands for a small float, each scale for a float
or a power of two:

    fp8    W[n, k] = e4m3(code) · scale[n // rows, k // columns]                     (or e5m2)
    mxfp4  W[n, k] = e2m1(code) · 2^(scale[n, k // 32] - 127)
    nvfp4  W[n, k] = e2m1(code) · e4m3(scale[n, k // 16]) · global                   (or / global)

The small floats (sign, exponent, mantissa; no infinity):

    e4m3   exponent bias 7, 448 at most; 0x7f and 0xff are NaN
    e2m1   0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; two codes in a byte, the first in the low four bits
    e8m0   2^(byte - 127), a scale alone; 255 is NaN

The last block of a row or column may be cut off. The product is computed in float32 and rounded once. Only a
few rows are widened at a time, so decoding takes the codes, the result and CHUNK_BYTES. It is done where the
codes are: on an accelerator that knows eight-bit floats, else on the CPU.

Sources: OCP Microscaling Formats (MX) v1.0, section 5 (e4m3, e2m1, e8m0, mxfp4); DeepSeek-V3,
inference/kernel.py, `weight_dequant` (blocks of fp8; its `weight_scale_inv` multiplies); Transformers,
integrations/mxfp4.py, `convert_moe_packed_tensors` (order of the codes, transposition); NVIDIA ModelOpt,
`NVFP4QTensor.dequantize` (`weight_scale_2` multiplies); compressed-tensors, compressors/nvfp4
(`weight_global_scale` divides).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.errors import CheckpointError, NonFinite
from gptq_cli.model.facts import CodedTensor
from gptq_cli.wording import number_of

CHUNK_BYTES = 32 << 20
"""Memory beside the codes and the result."""
_BYTES_EACH = 16
"""On the way, for each weight: its index, its value, its scale and their product."""
_CHUNK_ELEMENTS = CHUNK_BYTES // _BYTES_EACH
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each code of four bits."""
E8M0_BIAS, E8M0_NAN = 127, 255
_DAMAGED = "the files are damaged, or were not written as their config says: fetch the model again"


def chunk_bytes(shape: Sequence[int]) -> int:
    """Memory that decoding a weight of this shape takes beside the codes and the result."""
    return min(CHUNK_BYTES, _BYTES_EACH * math.prod(shape))


def decodes_on(device: torch.device) -> bool:
    """Whether codes can be decoded there: Metal has no floats of eight bits."""
    return device.type != "mps"


def decode(
    coded: CodedTensor,
    codes: Tensor,  # fp8: (…, N, K); two codes a byte: (…, N, K/2), or (…, N, K/32, 16)
    scale: Tensor,  # one for each block of (N, K), in any shape that has as many elements; on the CPU
    global_scale: Tensor | None = None,  # one element
) -> Tensor:
    """The values where the codes are: bfloat16 (…, N, K), or (…, K, N) for codes of the transposed matrices.

    Raises `NonFinite` for a scale or a value that is not finite, and `CheckpointError` for a scale that is
    negative, or 0 where the codes are not.
    """
    packed = codes.element_size() == 1 and not codes.dtype.is_floating_point
    if coded.format == "mxfp4" and codes.ndim == 4:
        codes = codes.flatten(-2)
    *batch, n, stored = codes.shape
    k = 2 * stored if packed else stored
    rows, columns = coded.block[0] or n, coded.block[1] or k
    grid = (*batch, -(-n // rows), -(-k // columns))
    scales = _scales(coded, scale, global_scale)
    some_zero = bool((scales == 0).any())
    scales = scales.to(codes.device)
    scales = scales.expand(grid) if scales.numel() == 1 else scales.reshape(grid)
    shape = (*batch, k, n) if coded.transposed else (*batch, n, k)
    result = torch.empty(shape, dtype=torch.bfloat16, device=codes.device)
    flat, flat_codes, flat_scales = (
        x.reshape(math.prod(batch), *x.shape[-2:]) for x in (result, codes, scales)
    )
    step = max(1, _CHUNK_ELEMENTS // max(1, k))
    for matrix, matrix_codes, matrix_scales in zip(flat, flat_codes, flat_scales, strict=True):
        target = matrix.T if coded.transposed else matrix
        for start in range(0, n, step):
            part = matrix_codes[start : start + step]
            values = _e2m1(part) if packed else part.float()
            of_row = torch.arange(start, start + len(part), device=codes.device) // rows
            each = matrix_scales[of_row].repeat_interleave(columns, dim=1)[:, :k]
            if some_zero:
                _check_zeros(coded, values, each)
            target[start : start + step] = (values * each).to(torch.bfloat16)
            _check_values(coded, target[start : start + step])
    return result


def _e2m1(codes: Tensor) -> Tensor:  # (rows, K/2) bytes -> (rows, K) float32
    table = torch.tensor(E2M1, device=codes.device)
    pairs = codes.contiguous().view(torch.uint8)
    return torch.stack((table[(pairs & 15).int()], table[(pairs >> 4).int()]), dim=-1).flatten(-2)


def _scales(coded: CodedTensor, scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """The scales in float32, the global one included, checked."""
    scales = _checked(coded.scale.name, scale)
    if global_scale is None or coded.global_scale is None:
        return scales
    whole = _checked(coded.global_scale.name, global_scale)
    if bool((whole == 0).any()):
        raise CheckpointError(f"tensor {coded.global_scale.name} is 0", hint=_DAMAGED)
    if whole.numel() > 1:  # one for each matrix of a batch
        whole = whole.reshape(-1, *(1,) * (scales.ndim - 1))
    return scales / whole if coded.divides else scales * whole


def _checked(name: str, scale: Tensor) -> Tensor:
    """A tensor of scales in float32. Raises `NonFinite` and `CheckpointError`, naming it."""
    exponents = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    if exponents:
        powers = scale.contiguous().view(torch.uint8)
        wrong = powers == E8M0_NAN
        values = torch.ldexp(torch.ones(powers.shape), powers.int() - E8M0_BIAS)
    else:
        values = scale.float()
        wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        count = int(wrong.sum())
        raise NonFinite(
            f"tensor {name} holds {number_of(count, 'scale', 'that is', 'that are')} not finite",
            hint=_DAMAGED,
        )
    if bool((values < 0).any()):
        raise CheckpointError(
            f"tensor {name} holds {float(values.min()):g}; allowed: scales of at least 0", hint=_DAMAGED
        )
    return values


def _check_zeros(coded: CodedTensor, values: Tensor, scales: Tensor) -> None:
    if bool(values[scales == 0].any()):
        raise CheckpointError(
            f"tensor {coded.scale.name} holds a scale of 0 for codes that are not 0", hint=_DAMAGED
        )


def _check_values(coded: CodedTensor, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFinite(
            f"tensor {coded.codes.name} decodes to values that are not finite numbers", hint=_DAMAGED
        )
