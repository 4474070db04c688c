"""Every path of the packed linear equals dequantize-and-multiply, its dtype's rounding aside."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from gptq_cli.inference.crossover import Crossovers
from gptq_cli.inference.kernels import CpuInt4, Dequantize, cpu_block
from gptq_cli.inference.packed_linear import PackedLinear, choose
from gptq_cli.inference.scratch import Fresh, Scratch
from tests.checkpoint.checkpoints import Packed, Recipe, quantize_slowly
from tests.checkpoint.test_codes import random_weight, read

ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error (Frobenius norm): sums of hundreds of terms, inputs and outputs rounded."""
needs_int4 = pytest.mark.skipif(
    cpu_block() is None, reason="torch's CPU int4 layout is unknown on this machine"
)


def build(
    recipe: Recipe,
    rows: int = 96,
    columns: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    g_idx: Tensor | None = None,
) -> tuple[PackedLinear, Packed, Tensor | None]:
    packed = quantize_slowly(random_weight(rows, columns), recipe)
    vector = torch.randn(rows).to(dtype) if bias else None
    linear = PackedLinear(
        read(packed, recipe, g_idx), bias=vector, dtype=dtype, crossovers=Crossovers(), scratch=Scratch()
    )
    return linear, packed, vector


def assert_equal_products(linear: PackedLinear, weight: Tensor, x: Tensor, bias: Tensor | None) -> None:
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected = expected + bias.double()
    with torch.inference_mode():
        found = linear(x)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    error = (found.double() - expected).norm() / expected.norm()
    assert error < ROUNDING[x.dtype]


def both_paths(linear: PackedLinear, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
    """M = 1, 3, 17 by the fused kernel (where there is one), then all of them by dequantization."""
    columns = weight.shape[1]
    for max_fused_tokens in (1 << 20, 0) if linear.kernel.can_fuse else (0,):
        linear.max_fused_tokens = max_fused_tokens
        for tokens in (1, 3, 17):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            assert_equal_products(linear, weight, x, bias)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1, 16])
@pytest.mark.parametrize("sym", [True, False])
def test_bfloat16_on_cpu(bits: int, group: int, sym: bool) -> None:
    recipe = Recipe(bits=bits, group_size=group, sym=sym, version="gptq" if sym else "gptq_v2")
    linear, packed, _ = build(recipe)
    if cpu_block() is not None:
        assert isinstance(linear.kernel, Dequantize if group == 16 else CpuInt4)
    both_paths(linear, packed.weight, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_other_dtypes_dequantize(dtype: torch.dtype, bits: int, sym: bool) -> None:
    recipe = Recipe(bits=bits, group_size=32, sym=sym, version="gptq_v2")
    linear, packed, _ = build(recipe, dtype=dtype)
    assert isinstance(linear.kernel, Dequantize)
    assert linear.max_fused_tokens == 0
    both_paths(linear, packed.weight, dtype)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activation_order(bits: int, dtype: torch.dtype) -> None:
    recipe = Recipe(bits=bits, group_size=32, desc_act=True)
    linear, packed, _ = build(recipe, dtype=dtype)
    assert linear.order is not None
    both_paths(linear, packed.weight, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sym", [True, False])
def test_groups_of_different_sizes(dtype: torch.dtype, sym: bool) -> None:
    recipe = Recipe(group_size=32, sym=sym, version="gptq_v2")
    g_idx = torch.tensor([0] * 50 + [1] * 14 + [3] * 64, dtype=torch.int32)[torch.randperm(128)]
    linear, packed, _ = build(recipe, columns=128, dtype=dtype, g_idx=g_idx)
    assert isinstance(linear.kernel, Dequantize)
    assert "different numbers" in linear.reason
    levels = packed.codes.double() - packed.zeros.double().T[:, g_idx.long()]
    both_paths(linear, levels * packed.scales.double().T[:, g_idx.long()], dtype)


@pytest.mark.parametrize(("rows", "columns"), [(64, 100), (17, 64), (50, 96), (1, 32), (130, 300)])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_that_no_kernel_takes_are_padded(
    rows: int, columns: int, group: int, bits: int, dtype: torch.dtype
) -> None:
    recipe = Recipe(bits=bits, group_size=group, sym=False, version="gptq_v2")
    linear, packed, bias = build(recipe, rows, columns, dtype, bias=True)
    both_paths(linear, packed.weight, dtype, bias)


def test_a_dense_weight_is_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, packed, _ = build(Recipe(group_size=32), rows=300, columns=64)
    monkeypatch.setattr("gptq_cli.inference.packed_linear._CPU_DENSE_ELEMENTS", 64 * 128)
    pieces: list[tuple[int, int]] = []
    dense = linear.kernel.dense

    def spy(buffers: Any, start: int, stop: int, dtype: torch.dtype, memory: Fresh) -> Tensor:
        pieces.append((start, stop))
        return dense(buffers, start, stop, dtype, memory)

    monkeypatch.setattr(linear.kernel, "dense", spy)
    linear.max_fused_tokens = 0
    assert_equal_products(linear, packed.weight, torch.randn(5, 64).bfloat16(), None)
    assert pieces == [(0, 128), (128, 256), (256, 320)]


def test_leading_dimensions_and_empty_inputs() -> None:
    linear, packed, _ = build(Recipe(group_size=32))
    x = torch.randn(2, 3, 256).bfloat16()
    assert_equal_products(linear, packed.weight, x, None)
    assert linear(x[:, :0]).shape == (2, 0, 96)


def test_an_input_of_another_dtype_takes_the_dequantize_path() -> None:
    linear, packed, _ = build(Recipe(group_size=32))
    linear.max_fused_tokens = 1 << 20
    x = torch.randn(2, 256)
    expected = x.double() @ packed.weight.T
    assert (linear(x).double() - expected).norm() / expected.norm() < 1e-2


@needs_int4
def test_the_fused_kernel_is_used_for_few_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, _, _ = build(Recipe(group_size=32))
    calls: list[int] = []
    fused = linear.kernel.fused
    monkeypatch.setattr(linear.kernel, "fused", lambda x, buffers: calls.append(len(x)) or fused(x, buffers))
    linear.max_fused_tokens = 4
    for tokens in (1, 4, 5, 64):
        linear(torch.randn(tokens, 256).bfloat16())
    assert calls == [1, 4]


def test_dequantize_on_request() -> None:
    recipe = Recipe(group_size=32)
    codes = read(quantize_slowly(random_weight(16, 64), recipe), recipe)
    choice = choose(codes, torch.device("cpu"), torch.bfloat16, "dequantize")
    assert choice.kernel is Dequantize
    assert choice.reason == "requested"


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [
        ("cpu", torch.float32, "bfloat16 only"),
        ("cuda", torch.float16, "bfloat16 only"),
        ("mps", torch.float16, "no int4 kernel"),
        ("xpu", torch.float32, "no int4 kernel"),
    ],
)
def test_every_fallback_says_why(device: str, dtype: torch.dtype, words: str) -> None:
    recipe = Recipe(group_size=32)
    codes = read(quantize_slowly(random_weight(16, 64), recipe), recipe)
    choice = choose(codes, torch.device(device), dtype, "auto")
    assert choice.kernel is Dequantize
    assert words in choice.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_accelerate_offload_hooks(dtype: torch.dtype) -> None:
    """A cpu entry of a map with several devices: buffers on meta between forwards, brought in for each."""
    linear, packed, bias = build(Recipe(group_size=32, desc_act=True), dtype=dtype, bias=True)
    model = nn.Sequential(linear)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert linear.packed.is_meta
    for tokens in (1, 40):
        assert_equal_products(linear, packed.weight, torch.randn(tokens, 256).to(dtype), bias)
    assert linear.packed.is_meta


def test_the_weight_is_a_stand_in() -> None:
    linear, _, _ = build(Recipe(group_size=32))
    assert linear.weight.dtype == torch.bfloat16
    assert linear.weight.numel() == 0
    assert "kernel=" in repr(linear)


def test_what_is_held_is_little_more_than_the_packed_tensors() -> None:
    recipe = Recipe(group_size=128)
    linear, packed, _ = build(recipe, rows=256, columns=1024)
    stored = sum(t.numel() * t.element_size() for t in packed.tensors("layer").values())
    held = sum(t.numel() * t.element_size() for t in linear.buffers())
    assert held <= 1.05 * stored


def fails(*args: Any) -> Tensor:
    raise NotImplementedError("Could not run the operator with these arguments.\nmore")


def starves(*args: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB.")


@needs_int4
@pytest.mark.parametrize("method", ["make_buffers", "fused"])
def test_an_operator_that_raises_at_load_is_done_without(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuInt4, method, fails)
    linear, packed, bias = build(Recipe(group_size=32), bias=True)
    assert isinstance(linear.kernel, Dequantize)
    said = "Could not run the operator with these arguments."
    assert linear.reason == f"torch's operator for cpu-int4 fails: {said}"
    both_paths(linear, packed.weight, torch.bfloat16, bias)


@needs_int4
def test_an_operator_that_raises_later_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, packed, bias = build(Recipe(group_size=32), bias=True)
    linear.max_fused_tokens = 8
    assert linear.kernel_name == "cpu-int4"
    monkeypatch.setattr(CpuInt4, "fused", fails)
    assert_equal_products(linear, packed.weight, torch.randn(2, 256).bfloat16(), bias)
    assert (linear.kernel_name, linear.max_fused_tokens) == ("dequantize", 0)
    assert linear.reason.startswith("torch's operator for cpu-int4 fails: ")


@needs_int4
def test_a_lack_of_memory_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, _, _ = build(Recipe(group_size=32))
    linear.max_fused_tokens = 8
    monkeypatch.setattr(CpuInt4, "fused", starves)
    with pytest.raises(torch.OutOfMemoryError):
        linear(torch.randn(2, 256).bfloat16())
    with pytest.raises(torch.OutOfMemoryError):
        build(Recipe(group_size=32))
