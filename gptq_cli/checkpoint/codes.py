"""The packed tensors of one linear, in a form that kernels can be built from.

A checkpoint stores codes in 32-bit words along K (`qweight`), zeros along N (`qzeros`), and in `g_idx` the
group of every input column. A kernel needs the rows of a group next to each other, so the rows are put in
*solved order* here, once: row i of `LinearCodes.codes` belongs to input column `order[i]`, and the caller
gathers its input by the same order. With a trivial `g_idx` (i // group) nothing moves and `order` is None.

The value of row k, column n is `scales[g, n] * (codes[k, n] - zeros[g, n])`, g the group of the row.
Codes are kept (K, N), as in the file, which saves a transposition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_cli.checkpoint.checkpoint import PackedInfo, trivial_g_idx
from gptq_cli.gptq.packing import PackedTensors, fields_to_zeros, unpack_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCodes:
    """One linear. `group` is a number of rows; the last group may have fewer.

    The codes stay in the words of the file until `rows()` is called: the most common kernel repacks the words
    and never calls it.
    """

    words: Tensor | None  # (ceil(K * bits / 32), N) int32, rows in input order; None: `codes` is given
    scales: Tensor  # (G, N) floating
    zeros: Tensor  # (G, N) int16
    bits: int
    group: int
    in_features: int
    """K."""
    out_features: int
    """N."""
    order: Tensor | None = None  # (K,) int64
    row_group: Tensor | None = None  # (K,) int64, only where groups are not runs of `group` rows
    codes: Tensor | None = None  # (K, N) uint8, rows in solved order

    @property
    def device(self) -> torch.device:
        """The device of the linear."""
        return self.scales.device

    def rows(self) -> Tensor:
        """(K, N) uint8 codes in solved order."""
        if self.codes is not None:
            return self.codes
        assert self.words is not None
        codes = unpack_rows(self.words, self.bits, self.in_features)
        return codes if self.order is None else codes.index_select(0, self.order)


def unpack_zeros(
    words: Tensor,  # (G, ceil(N * bits / 32)) int32
    bits: int,
    out_features: int,
    checkpoint_format: str,
) -> Tensor:
    """Return (G, N) int16 zeros. v1 ("gptq") stores zero - 1 in `bits` bits: zero 0 wraps to the top code."""
    fields = unpack_rows(words.t().contiguous(), bits, out_features).t()
    return fields_to_zeros(fields, bits, checkpoint_format).to(torch.int16).contiguous()


def codes_of(info: PackedInfo, packed: PackedTensors) -> LinearCodes:
    """The codes of a linear of a checkpoint, from its tensors as `read_packed` returns them: their g_idx is
    in range, and never missing."""
    form = info.format
    codes = LinearCodes(
        words=packed.qweight,
        scales=packed.scales,
        zeros=unpack_zeros(packed.qzeros, form.bits, info.out_features, form.checkpoint_format),
        bits=form.bits,
        group=info.in_features if form.group_size == -1 else form.group_size,
        in_features=info.in_features,
        out_features=info.out_features,
    )
    index, trivial = packed.g_idx.long(), trivial_g_idx(info, packed.g_idx.device).long()
    if torch.equal(index, trivial):
        return codes
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    return replace(codes, order=order, row_group=None if torch.equal(ordered, trivial) else ordered)


def as_four_bits(linear: LinearCodes) -> LinearCodes:
    """2- and 3-bit codes as 4-bit codes with every zero at 8. Exact, because q + 8 - z stays in 0..15."""
    if linear.bits > 3:
        return linear
    shift = (8 - linear.zeros).to(torch.uint8)
    codes = linear.rows() + spread(linear, shift)
    return replace(linear, words=None, codes=codes, zeros=torch.full_like(linear.zeros, 8), bits=4)


def spread(linear: LinearCodes, per_group: Tensor) -> Tensor:
    """(G, N) -> (K, N): each row gets the entry of its group."""
    if linear.row_group is not None:
        return per_group.index_select(0, linear.row_group)
    return per_group.repeat_interleave(linear.group, 0)[: linear.in_features]


def dequantize(linear: LinearCodes) -> Tensor:
    """The (N, K) float32 weight, columns in *input* order: the reference for every kernel."""
    centred = linear.rows().to(torch.int16) - spread(linear, linear.zeros)
    weight = centred.float() * spread(linear, linear.scales.float())
    if linear.order is not None:
        weight = torch.empty_like(weight).index_copy_(0, linear.order, weight)
    return weight.t()
