"""Layouts: ours against the operators', and the CUDA and XPU kernels against operators imitated in Python."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptq_cli.checkpoint.codes import dequantize
from gptq_cli.gptq.packing import pack_rows
from gptq_cli.inference.kernels import (
    CpuInt4,
    Dequantize,
    Kernel,
    Tinygemm,
    XpuInt4,
    cpu_block,
    from_nibbles,
    repack,
    tile_order,
    to_nibbles,
    words_to_nibbles,
)
from gptq_cli.inference.nibble_layout import make_nibble_layout, why_not_fused
from gptq_cli.inference.scratch import Fresh, Scratch
from tests.checkpoint.checkpoints import Recipe, quantize_slowly
from tests.checkpoint.test_codes import random_weight, read

TILE_SEED = 5


def slow_nibbles(codes: Tensor, block: int) -> Tensor:
    """`to_nibbles`, byte by byte."""
    rows, columns = codes.shape
    result = torch.zeros(columns // block, rows, block // 2, dtype=torch.uint8)
    for b in range(columns // block):
        for r in range(rows):
            for d in range(block // 2):
                low, high = int(codes[r, b * block + d]), int(codes[r, b * block + block // 2 + d])
                result[b, r, d] = low | high << 4
    return result


@pytest.mark.parametrize("block", [64, 32])
def test_nibble_layout(block: int) -> None:
    codes = torch.randint(0, 16, (6, 128), dtype=torch.uint8)
    packed = to_nibbles(codes, block)
    assert torch.equal(packed.flatten(), slow_nibbles(codes, block).flatten())
    assert torch.equal(from_nibbles(packed, 6, 1, block, torch.float32, Fresh()), codes.float() - 8)


@pytest.mark.parametrize("block", [64, 32])
@pytest.mark.parametrize("step", [1, 1000, 1 << 19])
def test_words_are_repacked_without_unpacking(block: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_cli.inference.kernels._REPACK_WORDS", step)
    codes = torch.randint(0, 16, (72, 192), dtype=torch.uint8)
    assert torch.equal(repack(pack_rows(codes, 4), block), to_nibbles(codes, block))


def test_the_short_way_is_taken_only_where_it_is_right() -> None:
    recipe = Recipe(group_size=32)
    codes = read(quantize_slowly(random_weight(64, 64), recipe), recipe)
    assert make_nibble_layout(codes, fused=True).words() is not None
    ordered = Recipe(group_size=32, desc_act=True)
    for other, rows, columns in (
        (ordered, 64, 64),
        (recipe, 60, 64),
        (recipe, 64, 72),
        (Recipe(bits=8, group_size=32), 64, 64),
    ):
        codes = read(quantize_slowly(random_weight(rows, columns), other), other)
        assert make_nibble_layout(codes, fused=True).words() is None


@pytest.mark.parametrize("block", [64, 32])
def test_two_nibbles_are_one_byte(block: int) -> None:
    codes = torch.randint(0, 256, (5, 64), dtype=torch.uint8)
    codes[0, :3] = torch.tensor([0, 128, 255], dtype=torch.uint8)
    packed = to_nibbles(torch.cat([codes >> 4, codes & 15]), block)
    assert torch.equal(from_nibbles(packed, 5, 2, block, torch.float32, Fresh()), codes.float() - 128)


@pytest.mark.skipif(cpu_block() is None, reason="the layout of torch's CPU kernel is unknown here")
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 192), (256, 64)])
def test_our_layout_is_the_operators(rows: int, columns: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().int().contiguous(), 1)
    block = cpu_block()
    assert block is not None
    assert torch.equal(to_nibbles(codes, block).flatten(), theirs.flatten())


def test_an_unexpected_layout_is_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", lambda q, _: q[:, ::2].to(torch.uint8)
    )
    cpu_block.cache_clear()
    try:
        assert cpu_block() is None
    finally:
        cpu_block.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_on_cpus_with_other_instructions(capability: str) -> None:
    """The same results in every layout of torch; in a process of its own, because torch chooses once."""
    code = (
        "import torch\n"
        "from tests.inference.test_packed_linear import both_paths, build\n"
        "from tests.checkpoint.checkpoints import Recipe\n"
        "for bits in (3, 4, 8):\n"
        "    linear, packed, _ = build(Recipe(bits=bits, group_size=32))\n"
        "    both_paths(linear, packed.weight, torch.bfloat16)\n"
        "print(linear.kernel.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("cpu-int4", "dequantize")


def unpacked_pairs(pairs: Tensor, *, high_first: bool) -> Tensor:
    """(N, K / 2) bytes of two codes -> (N, K)."""
    first, second = (pairs >> 4, pairs & 15) if high_first else (pairs & 15, pairs >> 4)
    return torch.stack([first, second], -1).flatten(1)


def imitated_pack(pairs: Tensor, inner: int) -> Tensor:
    """CUDA's `_convert_weight_to_int4pack` with an arbitrary but fixed order inside the tiles."""
    codes = unpacked_pairs(pairs, high_first=True).int()
    columns, rows = codes.shape
    tiles = codes.view(columns // 8, 8, rows // (16 * inner), 16 * inner).permute(0, 2, 1, 3).flatten(2)
    shuffled = tiles[..., imitated_order(inner)].view(*tiles.shape[:2], 32, inner // 2, 8)
    words = torch.zeros(shuffled.shape[:-1], dtype=torch.int32)
    for place in range(8):
        words |= shuffled[..., place] << (4 * place)
    return words


def imitated_order(inner: int) -> Tensor:
    return torch.randperm(128 * inner, generator=torch.Generator().manual_seed(TILE_SEED + inner))


def imitated_multiply(x: Tensor, packed: Tensor, group: int, scales_shifts: Tensor) -> Tensor:
    """CUDA's `_weight_int4pack_mm` for tiles of `imitated_pack`."""
    column_tiles, row_tiles, _, halves = packed.shape
    inner = 2 * halves
    nibbles = words_to_nibbles(packed.flatten(2))
    tiles = torch.empty_like(nibbles)
    tiles[..., imitated_order(inner)] = nibbles
    codes = tiles.view(column_tiles, row_tiles, 8, 16 * inner).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    scales = scales_shifts[..., 0].repeat_interleave(group, 0).T.double()
    shifts = scales_shifts[..., 1].repeat_interleave(group, 0).T.double()
    return (x.double() @ ((codes.double() - 8) * scales + shifts).T).to(x.dtype)


def imitated_xpu(x: Tensor, packed: Tensor, group: int, scales: Tensor, zeros: Tensor) -> Tensor:
    """XPU's kernel: x @ ((q - zero) * scale) with rows of int32 words, low nibble first."""
    codes = words_to_nibbles(packed).double()
    per_row = scales.repeat_interleave(group, 0).T.double()
    return (x.double() @ ((codes - zeros.repeat_interleave(group, 0).T.double()) * per_row).T).to(x.dtype)


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", imitated_pack)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", imitated_multiply)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_with_scales_and_zeros", imitated_xpu)


@pytest.mark.usefixtures("imitated")
@pytest.mark.parametrize("inner", [2, 4, 8])
def test_the_order_inside_a_tile_is_learnt(inner: int) -> None:
    codes = torch.randint(0, 16, (8, 16 * inner), dtype=torch.uint8)
    tile = imitated_pack(codes[:, ::2] << 4 | codes[:, 1::2], inner)
    found = words_to_nibbles(tile.flatten())[tile_order(inner, "cpu")]
    assert torch.equal(found, codes.flatten().int())


@pytest.mark.usefixtures("imitated")
@pytest.mark.parametrize("kernel_class", [Tinygemm, XpuInt4, CpuInt4, Dequantize])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "columns"), [(32, 96), (64, 256), (128, 512), (-1, 300)])
@pytest.mark.parametrize("sym", [True, False])
def test_fused_and_dense_agree_with_the_codes(
    kernel_class: type[Kernel], bits: int, group: int, columns: int, sym: bool
) -> None:
    if kernel_class is CpuInt4 and cpu_block() is None:
        pytest.skip("the layout of torch's CPU kernel is unknown here")
    recipe = Recipe(bits=bits, group_size=group, sym=sym, version="gptq_v2")
    codes = read(quantize_slowly(random_weight(40, columns), recipe), recipe)
    weight = dequantize(codes).double()
    layout = make_nibble_layout(codes, fused=kernel_class.can_fuse)
    kernel = kernel_class(layout, torch.bfloat16)
    buffers = kernel.make_buffers(layout)
    dense = kernel.dense(buffers, 0, kernel.columns, torch.bfloat16, Fresh())[:columns, :40]
    assert relative(dense.double().T, weight) < 6e-3
    half = kernel.dense(buffers, 0, 64, torch.float32, Fresh())[:columns, :40]
    assert relative(half.double().T, weight) < 6e-3
    if not kernel_class.can_fuse:
        return
    x = torch.randn(3, columns).bfloat16()
    wide = torch.nn.functional.pad(x, (0, kernel.rows - columns))
    if kernel.nibbles_per_code == 2:
        wide = torch.cat([wide, wide], 1)
    assert relative(kernel.fused(wide, buffers)[:, :40].double(), x.double() @ weight.T) < 1e-2
    part = kernel.restrict(buffers, 64)
    assert torch.equal(kernel.fused(wide, part), kernel.fused(wide, buffers)[:, :64])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_dequantize_keeps_the_scales_of_the_file() -> None:
    """float16 scales in a float32 model: exact, no rounding to the kernel's own dtype."""
    recipe = Recipe(group_size=16, sym=False, version="gptq_v2")
    codes = read(quantize_slowly(random_weight(64, 64), recipe), recipe)
    kernel = Dequantize(layout := make_nibble_layout(codes, fused=False), torch.float32)
    assert torch.equal(
        kernel.dense(kernel.make_buffers(layout), 0, 64, torch.float32, Fresh()).T, dequantize(codes)
    )


@pytest.mark.parametrize(("group", "legal"), [(32, True), (96, True), (384, True), (16, False), (48, False)])
def test_groups_that_a_kernel_takes(group: int, legal: bool) -> None:
    recipe = Recipe(group_size=group)
    codes = read(quantize_slowly(random_weight(8, 768), recipe), recipe)
    assert (why_not_fused(codes) is None) is legal
    if legal:
        assert make_nibble_layout(codes, fused=True).group in (32, 128)


@pytest.mark.parametrize(
    ("columns", "group", "rows"), [(576, 64, 576), (4096, 256, 4096), (100, 32, 128), (4112, 128, 4224)]
)
def test_one_group_per_row_is_cut_into_legal_groups(columns: int, group: int, rows: int) -> None:
    recipe = Recipe(group_size=-1)
    codes = read(quantize_slowly(random_weight(2, columns), recipe), recipe)
    layout = make_nibble_layout(codes, fused=True)
    assert (layout.group, layout.rows) == (group, rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA machine")
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_on_cuda(bits: int, sym: bool) -> None:
    from gptq_cli.inference.crossover import Crossovers
    from gptq_cli.inference.packed_linear import PackedLinear

    recipe = Recipe(bits=bits, group_size=64, sym=sym, version="gptq_v2", desc_act=True)
    packed = quantize_slowly(random_weight(200, 512), recipe)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    on_card = replace(packed, **{part: getattr(packed, part).cuda() for part in parts})
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        linear = PackedLinear(
            read(on_card, recipe), bias=None, dtype=dtype, crossovers=Crossovers(), scratch=Scratch()
        )
        assert isinstance(linear.kernel, Tinygemm if dtype == torch.bfloat16 else Dequantize)
        for max_fused_tokens in (0, 1 << 20) if linear.kernel.can_fuse else (0,):
            linear.max_fused_tokens = max_fused_tokens
            x = torch.randn(5, 512, device="cuda").to(dtype)
            assert relative(linear(x).double().cpu(), x.double().cpu() @ packed.weight.T) < 1e-2
