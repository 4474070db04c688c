"""The codes of a linear, padded and rewritten as 4-bit numbers (nibbles) that a kernel takes.

All kernels compute `w = (q - 8) * scale + shift` with q in 0..15. Three things are done to get there:

- 2- and 3-bit codes move up until their zero is 8: exact, q + 8 - z stays in 0..15.
- An 8-bit code becomes two nibbles: q - 128 = 16 (hi - 8) + lo. The weight then has twice as many rows, first
  the high nibbles, then the low ones; its input is repeated, and the kernel adds both halves up.
- Rows are padded to whole groups, columns to whole blocks. The caller pads its input with zeros, so that the
  values of padded rows do not matter, and drops the padded columns.

torch's kernels accept groups of 32, 64, 128 or 256 rows only. A larger group that is a multiple of one of
these is split and its scale repeated; so is a group that spans all rows (`group_size` -1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gptq_cli.checkpoint.codes import LinearCodes, as_four_bits

LEGAL_GROUPS = (256, 128, 64, 32)
"""Rows that a group may have in torch's int4 kernels."""
COLUMN_BLOCK = 64
"""Columns are padded to whole blocks of this many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NibbleLayout:
    """What a kernel is built from. A group is `group` consecutive rows, unless `row_group` gives each
    row's."""

    linear: LinearCodes
    """Four bits, or eight with two nibbles per code; not padded."""
    scales: Tensor  # (groups, columns), in the checkpoint's dtype
    zeros: Tensor  # (groups, columns) int16; the middle is 8, or 128 with two nibbles per code
    rows: int
    columns: int
    group: int
    nibbles_per_code: int
    row_group: Tensor | None = None

    @property
    def middle(self) -> int:
        """The zero for which no shift is needed."""
        return 8 if self.nibbles_per_code == 1 else 128

    @property
    def shifted(self) -> bool:
        """True when some zero is not the middle."""
        return not bool((self.zeros == self.middle).all())

    def codes(self) -> Tensor:
        """(nibbles * rows, columns) uint8 in 0..15."""
        linear = self.linear
        codes = _pad(linear.rows(), self.rows - linear.in_features, self.columns - linear.out_features)
        return codes if self.nibbles_per_code == 1 else torch.cat([codes >> 4, codes & 15])

    def words(self) -> Tensor | None:
        """(rows / 8, columns) int32 words of 4-bit codes where they can stay as in the file; else None."""
        linear = self.linear
        same = (linear.in_features, linear.out_features) == (self.rows, self.columns)
        ready = linear.words is not None and linear.bits == 4 and linear.order is None
        return linear.words if ready and same and self.rows % 8 == 0 else None

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Float32 scales and shifts of every nibble, (nibbles * groups, columns) each.

        For kernels that multiply by one matrix: each nibble q stands for (q - 8) * scale + shift.
        """
        scales = self.scales.float()
        if self.nibbles_per_code == 1:
            return scales, (8 - self.zeros) * scales
        low_shift = (136 - self.zeros) * scales
        return torch.cat([16 * scales, scales]), torch.cat([torch.zeros_like(low_shift), low_shift])


def why_not_fused(linear: LinearCodes) -> str | None:
    """Why no built-in int4 kernel can take this linear, or None."""
    if linear.row_group is not None:
        return "g_idx gives the groups different numbers of columns"
    if linear.group != linear.in_features and _legal_group(linear) is None:
        return f"group size {linear.group} is not a multiple of 32"
    return None


def _legal_group(linear: LinearCodes) -> int | None:
    """The largest group size of torch's kernels that divides this linear's group size.

    Where one group spans all rows: the largest that needs little padding.
    """
    if linear.group != linear.in_features:
        return next((legal for legal in LEGAL_GROUPS if linear.group % legal == 0), None)
    rows = linear.in_features
    return next((legal for legal in LEGAL_GROUPS if -rows % legal <= rows // 32), LEGAL_GROUPS[-1])


def make_nibble_layout(linear: LinearCodes, *, fused: bool) -> NibbleLayout:
    """The layout of `linear`; `fused`: in groups that torch's int4 kernels accept (`why_not_fused` is
    None)."""
    linear = as_four_bits(linear)
    scales, zeros, group = linear.scales, linear.zeros, linear.group
    rows = linear.in_features
    if fused:
        legal = _legal_group(linear)
        assert legal is not None
        groups = -(-rows // legal)
        repeats = -(-group // legal)
        scales = scales.repeat_interleave(repeats, 0)[:groups]
        zeros = zeros.repeat_interleave(repeats, 0)[:groups]
        group = legal
    if linear.row_group is None:
        rows = -(-rows // group) * group
    columns = -(-linear.out_features // COLUMN_BLOCK) * COLUMN_BLOCK
    more_columns = columns - linear.out_features
    nibbles_per_code = 2 if linear.bits == 8 else 1
    return NibbleLayout(
        linear=linear,
        scales=_pad(scales, 0, more_columns),
        zeros=_pad(zeros, 0, more_columns, 8 if nibbles_per_code == 1 else 128),
        rows=rows,
        columns=columns,
        group=group,
        nibbles_per_code=nibbles_per_code,
        row_group=linear.row_group,
    )


def _pad(tensor: Tensor, rows: int, columns: int, value: int = 0) -> Tensor:
    return functional.pad(tensor, (0, columns, 0, rows), value=value) if rows or columns else tensor
