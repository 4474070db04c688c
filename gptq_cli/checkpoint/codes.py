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

from gptq_cli.checkpoint.checkpoint import PackedInfo
from gptq_cli.errors import CheckpointError
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


def read_codes(
    name: str,
    *,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    desc_act: bool,
    checkpoint_format: str,
    in_features: int,
    out_features: int,
) -> LinearCodes:
    """Unpack the tensors of the linear `name`; `CheckpointError` names it where they contradict each other.

    A missing `g_idx`, and the all-zero one that some write for "no activation order", mean i // group.
    """
    group = in_features if group_size == -1 else group_size
    groups = -(-in_features // group)
    _expect(name, "qweight", tuple(qweight.shape), (-(-in_features * bits // 32), out_features))
    _expect(name, "qzeros", tuple(qzeros.shape), (groups, -(-out_features * bits // 32)))
    _expect(name, "scales", tuple(scales.shape), (groups, out_features))
    codes = LinearCodes(
        words=qweight,
        scales=scales,
        zeros=unpack_zeros(qzeros, bits, out_features, checkpoint_format),
        bits=bits,
        group=group,
        in_features=in_features,
        out_features=out_features,
    )
    if g_idx is None:
        return codes
    _expect(name, "g_idx", tuple(g_idx.shape), (in_features,))
    index = g_idx.long()
    trivial = torch.arange(in_features, device=index.device) // group
    if torch.equal(index, trivial) or (not desc_act and not index.any()):
        return codes
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise CheckpointError(
            f"{name}.g_idx holds groups {int(index.min())} to {int(index.max())}; allowed: 0 to {groups - 1}"
        )
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    return replace(codes, order=order, row_group=None if torch.equal(ordered, trivial) else ordered)


def codes_of(info: PackedInfo, packed: PackedTensors) -> LinearCodes:
    """The codes of a linear of a checkpoint, from its tensors as `read_packed` returns them."""
    form = info.format
    return read_codes(
        info.source_name,
        qweight=packed.qweight,
        qzeros=packed.qzeros,
        scales=packed.scales,
        g_idx=packed.g_idx,
        bits=form.bits,
        group_size=form.group_size,
        desc_act=form.desc_act,
        checkpoint_format=form.checkpoint_format,
        in_features=info.in_features,
        out_features=info.out_features,
    )


def _expect(name: str, tensor: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{name}.{tensor} has shape {list(found)}; the layer and its quantization need {list(wanted)}",
            hint="the checkpoint is damaged or was written by a tool that packs differently: fetch it again",
        )


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
