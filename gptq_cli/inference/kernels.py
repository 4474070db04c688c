"""How a device holds the codes of a linear, and how it multiplies by them.

Every kernel can multiply in two ways from the same buffers, because neither is faster everywhere:

    fused(x)           a few tokens: torch's built-in int4 matmul reads a quarter of the bytes that bf16 would
    dense(start, stop) many tokens: some columns of the weight are made dense, multiplied with a GEMM, dropped

    CpuInt4     bf16 on a CPU         aten._weight_int4pack_mm_for_cpu
    Tinygemm    bf16 on CUDA          aten._weight_int4pack_mm
    XpuInt4     bf16, fp16 on XPU     aten._weight_int4pack_mm_with_scales_and_zeros
    Dequantize  everything else       dense() only

The layouts of the CPU and CUDA operators are private to torch. `dense` must read them, so they are found out
by packing known codes with the operator itself (`cpu_block`, `tile_order`). Where the layout is unexpected,
or an operator raises, `Dequantize` is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.inference.nibble_layout import NibbleLayout
from gptq_cli.inference.scratch import Fresh

Buffers = dict[str, Tensor]
_LOW_NIBBLES = 0x0F0F0F0F
_REPACK_WORDS = 1 << 19


class Kernel(ABC):
    """Keeps shapes but no tensors: `make_buffers` makes a linear's buffers, the other methods take them."""

    name: ClassVar[str]
    can_fuse: ClassVar[bool] = True

    def __init__(self, layout: NibbleLayout, dtype: torch.dtype) -> None:
        self.rows = layout.rows
        self.columns = layout.columns
        self.group = layout.group
        self.nibbles_per_code = layout.nibbles_per_code
        self.shifted = layout.shifted
        self.dtype = dtype
        """What `fused` computes in."""

    @abstractmethod
    def make_buffers(self, layout: NibbleLayout) -> Buffers:
        """The buffers of one linear."""

    @abstractmethod
    def fused(self, x: Tensor, buffers: Buffers) -> Tensor:
        """x (M, nibbles * rows), contiguous -> (M, columns)."""

    @abstractmethod
    def dense(self, buffers: Buffers, start: int, stop: int, dtype: torch.dtype, memory: Fresh) -> Tensor:
        """Columns `start` to `stop` (whole blocks) of the weight, in `memory`: (rows, stop - start)."""

    def restrict(self, buffers: Buffers, columns: int) -> Buffers:
        """The buffers of the first `columns` columns, for the speed measurement in crossover.py."""
        return {name: self._restrict(name, tensor, columns) for name, tensor in buffers.items()}

    def _restrict(self, name: str, tensor: Tensor, columns: int) -> Tensor:
        return tensor[:columns] if name == "packed" else tensor[:, :columns].contiguous()

    def _stacked_scales(self, scales_shifts: Tensor) -> tuple[Tensor, Tensor | None]:
        """(nibbles * groups, n, 2) -> scales and shifts of (q - middle)."""
        own = scales_shifts[-(scales_shifts.shape[0] // self.nibbles_per_code) :]
        scales = own[..., 0].contiguous()
        if not self.shifted:
            return scales, None
        return scales, own[..., 1] if self.nibbles_per_code == 1 else own[..., 1].float() - 8 * scales.float()


def to_nibbles(codes: Tensor, block: int) -> Tensor:  # (R, C) uint8, C % block == 0
    """(C, R / 2) uint8: blocks of (R, block / 2) bytes, byte d holds columns d (low) and d + block / 2."""
    rows, columns = codes.shape
    halves = codes.view(rows, columns // block, 2, block // 2)
    packed = torch.empty(columns // block, rows, block // 2, dtype=torch.uint8, device=codes.device)
    packed.permute(1, 0, 2).copy_(halves[:, :, 0] | (halves[:, :, 1] << 4))
    return packed.view(columns, rows // 2) if rows % 2 == 0 else packed


def repack(words: Tensor, block: int) -> Tensor:  # (R / 8, C) int32, C % block == 0
    """`to_nibbles` of 4-bit codes that are still in the checkpoint's words, some rows of words at a time.

    A word of the low half block and one of the high half block are combined: their even codes give four
    finished bytes, their odd codes four more.
    """
    count, columns = words.shape
    half = block // 2
    packed = torch.empty(columns // block, count, 4, 2, half, dtype=torch.uint8, device=words.device)
    step = max(1, _REPACK_WORDS // columns)
    for start in range(0, count, step):
        halves = words[start : start + step].view(-1, columns // block, 2, half)
        low, high = halves[:, :, 0], halves[:, :, 1]
        even = (low & _LOW_NIBBLES) | ((high & _LOW_NIBBLES) << 4)
        odd = ((low >> 4) & _LOW_NIBBLES) | (high & ~_LOW_NIBBLES)
        target = packed[:, start : start + step].permute(1, 0, 2, 3, 4)
        for byte in range(4):
            target[:, :, byte, 0].copy_(even >> 8 * byte)
            target[:, :, byte, 1].copy_(odd >> 8 * byte)
    return packed.view(columns, 4 * count)


def nibbles_of(layout: NibbleLayout, block: int) -> Tensor:
    """The packed nibbles of a linear: straight from the file's words where possible."""
    words = layout.words()
    return to_nibbles(layout.codes(), block) if words is None else repack(words, block)


def from_nibbles(
    packed: Tensor, rows: int, nibbles_per_code: int, block: int, dtype: torch.dtype, memory: Fresh
) -> Tensor:
    """Inverse of `to_nibbles`, centred: (rows, C) of q - 8, or of q - 128 from two nibbles per code."""
    half = block // 2
    blocks = packed.numel() // (nibbles_per_code * rows * half)
    packed = packed.view(blocks, nibbles_per_code * rows, half)
    shape, device = (blocks, rows, half), packed.device
    high = memory.take("high", shape, torch.uint8, device)
    low = memory.take("low", shape, torch.int8, device)
    dense = memory.take("dense", (rows, blocks, 2, half), dtype, device)
    torch.bitwise_xor(packed[:, :rows], 0x88, out=high)  # offset binary to two's complement
    signed = high.view(torch.int8)
    torch.bitwise_left_shift(signed, 4, out=low)
    if nibbles_per_code == 1:
        low >>= 4
        signed >>= 4
    else:
        below = memory.take("below", shape, torch.uint8, device)
        low |= torch.bitwise_and(packed[:, rows:], 15, out=below).view(torch.int8)
        signed &= -16
        signed |= torch.bitwise_right_shift(packed[:, rows:], 4, out=below).view(torch.int8)
    dense[:, :, 0].copy_(low.permute(1, 0, 2))
    dense[:, :, 1].copy_(signed.permute(1, 0, 2))
    return dense.view(rows, blocks * block)


def scale_rows(dense: Tensor, scales: Tensor, shifts: Tensor | None, group: int) -> Tensor:
    """dense (rows, n) * scales (groups, n) + shifts, group by group, in place; rows % group == 0."""
    grouped = dense.view(-1, group, dense.shape[1])
    scales = scales.to(dense.dtype).unsqueeze(1)
    if shifts is None:
        grouped.mul_(scales)
    else:
        torch.addcmul(shifts.to(dense.dtype).unsqueeze(1), grouped, scales, out=grouped)
    return dense


class Dequantize(Kernel):
    """Packed nibbles, and scales as in the checkpoint. Uses only operators that every device has."""

    name = "dequantize"
    can_fuse = False
    block = 64

    def make_buffers(self, layout: NibbleLayout) -> Buffers:
        buffers = {"packed": nibbles_of(layout, self.block), "scales": layout.scales.contiguous()}
        if layout.shifted:
            buffers["offsets"] = (layout.middle - layout.zeros).contiguous()
        if layout.row_group is not None:
            buffers["row_group"] = layout.row_group
        return buffers

    def fused(self, x: Tensor, buffers: Buffers) -> Tensor:
        raise RuntimeError("dequantize has no fused form: ask `can_fuse` first")

    def dense(self, buffers: Buffers, start: int, stop: int, dtype: torch.dtype, memory: Fresh) -> Tensor:
        blocks = buffers["packed"].view(self.columns // self.block, -1)[
            start // self.block : stop // self.block
        ]
        dense = from_nibbles(blocks, self.rows, self.nibbles_per_code, self.block, dtype, memory)
        row_group = buffers.get("row_group")
        group = self.group if row_group is None else 1
        grouped = dense.view(-1, group, stop - start)
        for name in ("offsets", "scales"):
            if name not in buffers:
                continue
            values = buffers[name][:, start:stop].to(dtype)
            values = (values if row_group is None else values.index_select(0, row_group)).unsqueeze(1)
            grouped.add_(values) if name == "offsets" else grouped.mul_(values)
        return dense

    def _restrict(self, name: str, tensor: Tensor, columns: int) -> Tensor:
        return tensor if name == "row_group" else super()._restrict(name, tensor, columns)


class CpuInt4(Kernel):
    """torch's int4 kernel for CPUs, fast only in bf16."""

    name = "cpu-int4"

    def __init__(self, layout: NibbleLayout, dtype: torch.dtype) -> None:
        super().__init__(layout, dtype)
        block = cpu_block()
        assert block is not None
        self.block = block

    def make_buffers(self, layout: NibbleLayout) -> Buffers:
        scales_shifts = torch.stack(layout.stacked(), -1).to(self.dtype)
        return {"packed": nibbles_of(layout, self.block), "scales_shifts": scales_shifts.contiguous()}

    def fused(self, x: Tensor, buffers: Buffers) -> Tensor:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, buffers["packed"], self.group, buffers["scales_shifts"]
        )
        assert isinstance(product, Tensor)
        return product

    def dense(self, buffers: Buffers, start: int, stop: int, dtype: torch.dtype, memory: Fresh) -> Tensor:
        dense = from_nibbles(
            buffers["packed"][start:stop], self.rows, self.nibbles_per_code, self.block, dtype, memory
        )
        return scale_rows(dense, *self._stacked_scales(buffers["scales_shifts"][:, start:stop]), self.group)


@cache
def cpu_block() -> int | None:
    """Columns per block in the layout of torch's CPU kernel on this machine; None: the layout is unknown.

    torch chooses by instruction set: 64 columns with AVX-512, 32 with AVX2.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 64), dtype=torch.int32, generator=generator)
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return None
    columns_last = codes.t().to(torch.uint8).contiguous()
    for block in (64, 32):
        if torch.equal(to_nibbles(columns_last, block).view(-1), theirs.reshape(-1).view(torch.uint8)):
            return block
    return None


class Tinygemm(Kernel):
    """torch's int4 kernel for CUDA (compute capability 8.0 and up), bf16.

    Its layout consists of tiles of 8 columns and `16 * inner` rows. The order inside a tile follows the
    registers of the tensor cores; it is found by packing numbered elements (`tile_order`).
    """

    name = "cuda-int4"

    def __init__(self, layout: NibbleLayout, dtype: torch.dtype) -> None:
        super().__init__(layout, dtype)
        self.inner = next(
            inner for inner in (8, 4, 2) if layout.nibbles_per_code * layout.rows % (16 * inner) == 0
        )

    def make_buffers(self, layout: NibbleLayout) -> Buffers:
        columns_first = layout.codes().t()
        pairs = (columns_first[:, ::2] << 4 | columns_first[:, 1::2]).contiguous()
        return {
            "packed": torch.ops.aten._convert_weight_to_int4pack(pairs, self.inner),
            "scales_shifts": torch.stack(layout.stacked(), -1).to(self.dtype).contiguous(),
            "tile_order": tile_order(self.inner, str(pairs.device)),
        }

    def fused(self, x: Tensor, buffers: Buffers) -> Tensor:
        product = torch.ops.aten._weight_int4pack_mm(
            x, buffers["packed"], self.group, buffers["scales_shifts"]
        )
        assert isinstance(product, Tensor)
        return product

    def dense(self, buffers: Buffers, start: int, stop: int, dtype: torch.dtype, memory: Fresh) -> Tensor:
        order = buffers["tile_order"]
        tiles = buffers["packed"][start // 8 : stop // 8]
        codes = words_to_nibbles(tiles.reshape(tiles.shape[0], tiles.shape[1], -1))
        codes = codes.index_select(2, order).view(tiles.shape[0], tiles.shape[1], 8, 16 * self.inner)
        codes = codes.permute(1, 3, 0, 2).reshape(self.nibbles_per_code * self.rows, stop - start)
        return _centre_and_scale(self, codes, buffers["scales_shifts"][:, start:stop], dtype)

    def _restrict(self, name: str, tensor: Tensor, columns: int) -> Tensor:
        if name == "tile_order":
            return tensor
        return tensor[: columns // 8] if name == "packed" else super()._restrict(name, tensor, columns)


def _centre_and_scale(kernel: Kernel, codes: Tensor, scales_shifts: Tensor, dtype: torch.dtype) -> Tensor:
    """(nibbles * rows, n) codes 0..15 -> the dense (rows, n) weight."""
    if kernel.nibbles_per_code == 1:
        dense = codes.to(dtype).sub_(8)
    else:
        dense = (codes[: kernel.rows] * 16 + codes[kernel.rows :]).to(dtype).sub_(128)
    return scale_rows(dense, *kernel._stacked_scales(scales_shifts), kernel.group)


def words_to_nibbles(words: Tensor) -> Tensor:  # (..., W) int32
    """(..., 8 W) int32 in 0..15, low bits first."""
    places = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> places) & 15).flatten(-2)


def tile_order(inner: int, device: str) -> Tensor:
    """(128 inner,) int64: the place in a packed tile of the tile's element `column * 16 inner + row`.

    The elements are numbered and three tiles are packed, one for each nibble of the numbers. Raises
    `RuntimeError` where the operator does anything but reorder them.
    """
    size = 128 * inner
    numbers = torch.arange(size, device=device).view(8, 16 * inner)
    found = torch.zeros(size, dtype=torch.int64, device=device)
    for place in (0, 4, 8):
        nibble = ((numbers >> place) & 15).to(torch.uint8)
        tile = torch.ops.aten._convert_weight_to_int4pack(nibble[:, ::2] << 4 | nibble[:, 1::2], inner)
        found |= words_to_nibbles(tile.reshape(-1)).long() << place
    if not torch.equal(found.sort().values, numbers.flatten()):
        raise RuntimeError("its weight layout is unknown")
    order = torch.empty_like(found)
    order[found] = torch.arange(size, device=device)
    return order


class XpuInt4(Kernel):
    """torch's int4 kernel for Intel GPUs: rows packed low nibble first, zeros as int8, bf16 or fp16."""

    name = "xpu-int4"

    def make_buffers(self, layout: NibbleLayout) -> Buffers:
        columns_first = layout.codes().t()
        pairs = (columns_first[:, ::2] | columns_first[:, 1::2] << 4).contiguous()
        scales, zeros = layout.scales, layout.zeros
        if layout.nibbles_per_code == 2:
            scales, zeros = (
                torch.cat([16 * scales, scales]),
                torch.cat([torch.full_like(zeros, 8), zeros - 128]),
            )
        return {
            "packed": pairs.view(torch.int32),
            "scales": scales.to(self.dtype).contiguous(),
            "zeros": zeros.to(torch.int8).contiguous(),
        }

    def fused(self, x: Tensor, buffers: Buffers) -> Tensor:
        product = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros(
            x, buffers["packed"], self.group, buffers["scales"], buffers["zeros"]
        )
        assert isinstance(product, Tensor)
        return product

    def dense(self, buffers: Buffers, start: int, stop: int, dtype: torch.dtype, memory: Fresh) -> Tensor:
        codes = words_to_nibbles(buffers["packed"][start:stop]).t()
        groups = buffers["scales"].shape[0] // self.nibbles_per_code
        scales = buffers["scales"][-groups:, start:stop].to(dtype)
        zeros = buffers["zeros"][-groups:, start:stop].to(dtype)
        if self.nibbles_per_code == 2:
            codes = codes[: self.rows] * 16 + codes[self.rows :] - 128
        dense = codes.to(dtype).contiguous().view(groups, self.group, -1)
        return dense.sub_(zeros.unsqueeze(1)).mul_(scales.unsqueeze(1)).view(self.rows, -1)
