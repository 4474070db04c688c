"""Codes and scales become values: known answers, every code, every layout of scales, bad scales by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptq_cli.errors import CheckpointError, NonFinite
from gptq_cli.model import decoding
from gptq_cli.model.decoding import decode
from gptq_cli.model.facts import CodedTensor, CodeFormat, TensorInfo
from tests.encoders import E2M1, E4M3, fp8, mx_experts, nvfp4


def coded(form: CodeFormat, block: tuple[int, int], *, whole: bool = False, **more: Any) -> CodedTensor:
    def info(name: str) -> TensorInfo:
        return TensorInfo(name, (), "uint8", 0, "model.safetensors")

    return CodedTensor(
        format=form,
        codes=info("w"),
        scale=info("w_scale"),
        global_scale=info("w_whole") if whole else None,
        block=block,
        **more,
    )


def as_e4m3(*codes: int) -> Tensor:
    return torch.tensor([codes], dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_known_answers_of_e4m3() -> None:
    codes = as_e4m3(0x00, 0x01, 0x08, 0x38, 0x3C, 0x7E, 0x80, 0xB8, 0xFE)
    values = decode(coded("fp8", (0, 0)), codes, torch.tensor(1.0))
    assert values.dtype == torch.bfloat16
    assert values.tolist() == [[0.0, 2.0**-9, 2.0**-6, 1.0, 1.5, 448.0, -0.0, -1.0, -448.0]]


def test_known_answers_of_e2m1_and_their_order() -> None:
    """Sixteen codes in eight bytes, the first of a byte in its low bits."""
    pairs = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    values = decode(coded("mxfp4", (1, 32)), pairs, torch.tensor([[128]], dtype=torch.uint8))
    once = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values.tolist() == [[2 * value for value in once] + [-2 * value for value in once]]


@pytest.mark.parametrize(("byte", "power"), [(0, -127), (1, -126), (126, -1), (127, 0), (254, 127)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_known_answers_of_e8m0(byte: int, power: int, dtype: torch.dtype) -> None:
    scale = torch.tensor([[byte]], dtype=torch.uint8).view(dtype)
    pairs = torch.tensor([[0x21]], dtype=torch.uint8)
    assert decode(coded("mxfp4", (1, 32)), pairs, scale).tolist() == [[0.5 * 2.0**power, 2.0**power]]


def test_every_code_has_the_value_that_its_bits_define() -> None:
    codes = torch.tensor([i for i in range(256) if i & 0x7F != 0x7F], dtype=torch.uint8)[None]
    values = decode(coded("fp8", (0, 0)), codes.view(torch.float8_e4m3fn), torch.tensor(1.0))
    assert np.array_equal(values[0].double().numpy(), E4M3[~np.isnan(E4M3)])
    assert np.array_equal(decoding.E2M1, E2M1)


def test_the_two_ways_to_write_the_scale_of_a_tensor() -> None:
    pairs, scale = torch.full((1, 8), 0x22, dtype=torch.uint8), as_e4m3(0x40)  # codes of 1, a scale of 2
    factor = decode(coded("nvfp4", (1, 16), whole=True), pairs, scale, torch.tensor(4.0))
    divisor = decode(coded("nvfp4", (1, 16), whole=True, divides=True), pairs, scale, torch.tensor([4.0]))
    assert set(factor[0].tolist()) == {8.0}
    assert set(divisor[0].tolist()) == {0.5}


@pytest.mark.parametrize("rows", [0, 1, 5, 8])
@pytest.mark.parametrize("columns", [0, 3, 16, 64])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_scales_for_blocks_of_any_size(
    rows: int, columns: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block of a row and of a column may be cut off, and chunks need not end where blocks do."""
    monkeypatch.setattr(decoding, "_CHUNK_ELEMENTS", chunk)
    w = torch.randn(13, 20, generator=torch.Generator().manual_seed(3)).numpy()
    parts, values = fp8(rows, columns)("w", w)
    found = decode(coded("fp8", (rows, columns)), parts["w"], parts["w_scale_inv"])
    assert torch.equal(found, torch.from_numpy(values).to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 2, 3, 1), (2, 1, 2, 3)])
def test_a_batch_of_matrices(shape: tuple[int, ...]) -> None:
    ws = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(4)).numpy()
    made = [fp8(4, 4)("w", w) for w in ws]
    codes, scales = (torch.stack([parts[name] for parts, _ in made]) for name in ("w", "w_scale_inv"))
    found = decode(coded("fp8", (4, 4)), codes, scales.reshape(shape))
    assert torch.equal(found, torch.from_numpy(np.stack([v for _, v in made])).to(torch.bfloat16))


def test_a_scale_for_each_tensor_of_a_batch() -> None:
    codes = as_e4m3(0x38, 0x38, 0x38, 0x38).reshape(2, 1, 2)
    assert decode(coded("fp8", (0, 0)), codes, torch.tensor([2.0, 3.0])).flatten().tolist() == [2, 2, 3, 3]
    assert decode(coded("fp8", (0, 0)), codes, torch.tensor(5.0)).flatten().tolist() == [5, 5, 5, 5]


def test_experts_as_transformers_decodes_them() -> None:
    """`convert_moe_packed_tensors` is what gpt-oss's own loader does."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    w = torch.randn(3, 64, 40, generator=torch.Generator().manual_seed(5)).numpy()  # (experts, K, N)
    parts, values = mx_experts("w", w)
    found = decode(coded("mxfp4", (1, 32), transposed=True), parts["w_blocks"], parts["w_scales"])
    assert torch.equal(found, convert_moe_packed_tensors(parts["w_blocks"], parts["w_scales"]))
    assert torch.equal(found, torch.from_numpy(values).to(torch.bfloat16))


@pytest.mark.parametrize("modelopt", [True, False])
def test_a_matrix_comes_back_within_the_steps_of_its_format(modelopt: bool) -> None:
    w = torch.randn(6, 48, generator=torch.Generator().manual_seed(6)).numpy()
    parts, values = nvfp4(modelopt=modelopt)("w", w)
    what = replace(coded("nvfp4", (1, 16), whole=True), divides=not modelopt)
    found = decode(what, *parts.values())
    assert torch.equal(found, torch.from_numpy(values).to(torch.bfloat16))
    assert np.abs(found.float().numpy() - w).max() < np.abs(w).max() / 5


def test_zeros_may_have_any_scale() -> None:
    assert decode(coded("fp8", (0, 0)), as_e4m3(0, 0x80), torch.tensor(0.0)).abs().sum() == 0


@pytest.mark.parametrize(
    ("scale", "error", "says"),
    [
        (torch.tensor([float("nan")]), NonFinite, "w_scale holds 1 scale that is not finite"),
        (torch.tensor([float("inf")]), NonFinite, "w_scale holds 1 scale that is not finite"),
        (torch.tensor([255], dtype=torch.uint8), NonFinite, "w_scale holds 1 scale that is not finite"),
        (torch.tensor([-2.0]), CheckpointError, "w_scale holds -2; allowed: scales of at least 0"),
        (torch.tensor([0.0]), CheckpointError, "w_scale holds a scale of 0"),
        (torch.tensor([3e38]), NonFinite, "w decodes to values that are not finite"),
    ],
)
def test_bad_scales_are_named(scale: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        decode(coded("fp8", (0, 0)), as_e4m3(0x38, 0x7E), scale)


def test_a_bad_scale_of_the_tensor_is_named() -> None:
    pairs, scale = torch.full((1, 8), 0x22, dtype=torch.uint8), as_e4m3(0x40)
    for divides in (True, False):
        with pytest.raises(CheckpointError, match="w_whole is 0"):
            decode(coded("nvfp4", (1, 16), whole=True, divides=divides), pairs, scale, torch.tensor(0.0))


def test_codes_without_a_value_are_named() -> None:
    with pytest.raises(NonFinite, match="w decodes to values"):
        decode(coded("fp8", (0, 0)), as_e4m3(0x38, 0x7F), torch.tensor(1.0))
